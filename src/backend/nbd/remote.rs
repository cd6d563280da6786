//! An export of a server, as storage.

use std::io;
use std::ops::Range;
use std::time::{Duration, Instant};

use super::call::Call;
use super::connection::Connection;
use super::doubt::Doubt;
use super::hello::{Agreed, agree};
use super::lane::Lane;
use super::order::Order;
use super::tls::TlsConfig;
use super::{ConnectError, NbdUrl, RemoteOptions};
use crate::nbd::{BlockSizes, Errno, OptionError, TransmissionFlags, limits};

/// How long a further connection may take to be made. Some servers take only so many, and let the next one wait in silence; what it was to
/// carry goes over the others then, and it is not tried again for the longer time.
const FURTHER: Duration = Duration::from_secs(3);
const NOT_AGAIN: Duration = Duration::from_secs(60);

/// An export of a server, as storage: any server that speaks NBD.
///
/// ```text
///  read of a page  ────────► urgent ────────────────► server     the caller sends, and reads the answer itself
///  large reads,    ──┬─────► bulk 1 ────────────────►            opened when needed; their pieces are answered in any
///  read ahead        └─────► bulk n ────────────────►            order, straight into the caller's memory
/// ```
///
/// A server without multi-connection consistency is spoken to over one connection for all. A connection that is lost is made again, as often as the
/// deadline of an operation lets it, and what was not answered is asked again; an export that has another size then is refused.
/// What the server sends and should not ends the connection, and the operation, with [`io::ErrorKind::InvalidData`].
///
/// # Flush
/// A server that dies may take acknowledged writes with it. The first [`flush`](crate::chunk::Storage::flush) after it then fails with a [`DoubtfulWrites`](super::DoubtfulWrites) as its inner
/// error, which names the bytes, and so do flushes that were under way at the same time; later ones speak for later writes. That state
/// is cleared by itself: whoever still has the bytes writes them again and flushes. [`take_doubtful`](Self::take_doubtful) tells, at any time,
/// what was named and has not been written again.
///
/// A server can carry out a request after the connection over which it came was lost, and so after the same one was sent again and others
/// followed it. Nothing in the protocol prevents that; a server that ends a connection's requests before it forgets the connection does.
#[derive(Debug)]
pub struct Remote {
    url: NbdUrl,
    tls: Option<TlsConfig>,
    pub(super) options: RemoteOptions,
    pub(super) agreed: Agreed,
    pub(super) blocks: BlockSizes,
    /// The first is the urgent one, and the only one where there may be only one.
    pub(super) lanes: Vec<Lane>,
    pub(super) order: Order,
    pub(super) doubt: Doubt,
}

/// When requests were carried out, in the order in which connections are made.
#[derive(Debug, Clone, Copy)]
pub(super) struct CarriedOut {
    /// Which connection the last answer came over.
    pub(super) born: u64,
    /// How many connections there had been before the first answer, at least: any of these has been there since before all answers.
    pub(super) connections: u64,
}

/// Which connections an operation may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Path {
    Urgent,
    Bulk,
    /// One that has been there for long.
    Oldest,
}

impl Remote {
    /// Connects and agrees on the export: a round trip for TCP, and one for the agreement (TLS needs two more). The other connections are made when
    /// there is something to be carried by them.
    ///
    /// # Errors
    /// If nobody answers, the server or the certificates say no, or there is no such export. Is not tried again.
    pub fn connect(url: &NbdUrl, options: &RemoteOptions) -> Result<Self, ConnectError> {
        let tls = if url.tls() {
            Some(TlsConfig::new(&options.tls, url.place())?)
        } else {
            None
        };
        let deadline = Instant::now() + options.deadline;
        let (wire, inbox, agreed) = agree(url, tls.as_ref(), deadline)?;
        let doubt = Doubt::new();
        let born = doubt.connected();
        let urgent = Connection::new(wire, inbox, agreed.clone(), born);
        let further = if agreed.flags.contains(TransmissionFlags::CAN_MULTI_CONN) {
            options.connections
        } else {
            0
        };
        let lanes = std::iter::once(Lane::holding(urgent))
            .chain(std::iter::repeat_with(Lane::default).take(further))
            .collect();
        let blocks = agreed.blocks.unwrap_or(BlockSizes {
            minimum: 1,
            preferred: 4096,
            maximum: limits::PAYLOAD,
        });
        Ok(Self {
            url: url.clone(),
            tls,
            options: options.clone(),
            agreed,
            blocks,
            lanes,
            order: Order::default(),
            doubt,
        })
    }

    /// What was connected to.
    #[must_use]
    pub fn url(&self) -> &NbdUrl {
        &self.url
    }

    /// What the export can do.
    #[must_use]
    pub fn flags(&self) -> TransmissionFlags {
        self.agreed.flags
    }

    /// The sizes that requests have, as the server wants them, or as is usual where it says nothing.
    #[must_use]
    pub fn block_sizes(&self) -> BlockSizes {
        self.blocks
    }

    /// Whether writing is refused, by the server or by the options.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.options.read_only || self.has(TransmissionFlags::READ_ONLY)
    }

    /// Whether the server tells which bytes are zeros without sending them.
    #[must_use]
    pub fn knows_holes(&self) -> bool {
        self.agreed.allocation.is_some()
    }

    /// Why the server cannot be reached at this moment, if an attempt to connect again has failed and none has succeeded since. Operations
    /// say so only when their deadline is over.
    #[must_use]
    pub fn outage(&self) -> Option<String> {
        self.lanes[0].failure()
    }

    /// The bytes that [`DoubtfulWrites`](super::DoubtfulWrites) has named and nobody has written again. Taken, they are forgotten.
    #[must_use]
    pub fn take_doubtful(&self) -> Vec<Range<u64>> {
        self.doubt.take(self.agreed.size)
    }

    pub(super) fn has(&self, flag: TransmissionFlags) -> bool {
        self.agreed.flags.contains(flag)
    }

    /// Another connection to the same export.
    fn dial(&self, deadline: Instant) -> Result<Connection, ConnectError> {
        let (wire, inbox, agreed) = agree(&self.url, self.tls.as_ref(), deadline)?;
        let was = &self.agreed;
        let changed = |what: String| Err(ConnectError::Changed(what));
        if agreed.size != was.size {
            return changed(format!("{} bytes, and was {}", agreed.size, was.size));
        }
        if !agreed.flags.contains(was.flags) {
            return changed("it can do less than before".to_owned());
        }
        if agreed.flags.contains(TransmissionFlags::READ_ONLY)
            && !self.has(TransmissionFlags::READ_ONLY)
        {
            return changed("it is read-only now".to_owned());
        }
        if agreed.blocks != was.blocks || (was.allocation.is_some() && agreed.allocation.is_none())
        {
            return changed(
                "it wants requests of other sizes, or knows no holes any more".to_owned(),
            );
        }
        Ok(Connection::new(wire, inbox, agreed, self.doubt.connected()))
    }

    /// The lane for an operation, and whether one may do with the urgent one in its place.
    fn lane(&self, path: Path) -> &Lane {
        let (urgent, bulk) = (&self.lanes[0], &self.lanes[1..]);
        match path {
            Path::Urgent => urgent,
            Path::Oldest => self
                .lanes
                .iter()
                .filter_map(|lane| Some((lane.open()?.born, lane)))
                .min_by_key(|(born, _)| *born)
                .map_or(urgent, |(_, lane)| lane),
            // One that is idle and open is better than one that is idle and has to be opened.
            Path::Bulk => bulk
                .iter()
                .filter(|lane| !lane.has_failed())
                .min_by_key(|lane| (lane.users(), lane.open().is_none()))
                .unwrap_or(urgent),
        }
    }

    /// Has requests carried out, as often as connections are lost, until all are answered or the deadline passes.
    pub(super) fn carry_out(
        &self,
        path: Path,
        window: usize,
        calls: &mut [Call<'_>],
    ) -> io::Result<CarriedOut> {
        let patience = self.options.deadline;
        let mut deadline = Instant::now() + patience;
        let mut rest = calls;
        let mut connections = u64::MAX;
        loop {
            let lane = self.lane(path);
            let _using = lane.choose();
            let connection = self.connection(lane, deadline)?;
            // Once for each connection: answers of one that is lost stay, and those who come after it know nothing of them.
            let before = self.doubt.connections();
            let left = deadline.saturating_duration_since(Instant::now());
            let result = connection.run(rest, window, left);
            // A server that is about to go away is asked again, as one that has gone.
            for call in rest.iter_mut() {
                if call.outcome == Some(Err(Errno::Shutdown)) || call.outcome.is_none() {
                    call.reset();
                }
            }
            rest.sort_by_key(|call| call.outcome.is_none());
            let answered = rest.partition_point(|call| call.outcome.is_some());
            if answered > 0 {
                deadline = Instant::now() + patience;
                connections = connections.min(before);
            }
            let all = rest;
            rest = &mut all[answered..];
            if rest.is_empty() {
                return Ok(CarriedOut {
                    born: connection.born,
                    connections,
                });
            }
            match result {
                Err(fault) if !fault.is_of_the_connection() || Instant::now() >= deadline => {
                    return Err(fault.into());
                }
                Err(_) => {}
                Ok(()) => connection.hang_up(),
            }
        }
    }

    fn connection(&self, lane: &Lane, deadline: Instant) -> io::Result<std::sync::Arc<Connection>> {
        let urgent = &self.lanes[0];
        if !std::ptr::eq(lane, urgent) && lane.open().is_none() {
            // A further connection is tried once, and not for long, while there is one that works.
            let soon = deadline.min(Instant::now() + FURTHER);
            match lane.get(soon, || self.dial(soon), |_| false) {
                Ok(connection) => return Ok(connection),
                // A server that is away will be there again; one that does not want this one will not want it soon, nor another.
                Err(Some(error)) if is_away(&error) => {}
                Err(_) => {
                    for closed in self.lanes[1..].iter().filter(|lane| lane.open().is_none()) {
                        closed.rest(NOT_AGAIN);
                    }
                }
            }
        }
        urgent
            .get(deadline, || self.dial(deadline), is_worth_another_try)
            .map_err(|error| match error {
                Some(error) => error.into(),
                None => io::Error::new(
                    io::ErrorKind::TimedOut,
                    format!("no connection to {} in time", self.url),
                ),
            })
    }

    pub(super) fn check(&self, offset: u64, len: u64) -> io::Result<()> {
        match offset.checked_add(len) {
            Some(end) if end <= self.agreed.size => Ok(()),
            _ => Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                format!(
                    "the range is outside of an export of {} bytes",
                    self.agreed.size
                ),
            )),
        }
    }

    pub(super) fn check_writable(&self) -> io::Result<()> {
        if self.is_read_only() {
            return Err(io::Error::new(
                io::ErrorKind::ReadOnlyFilesystem,
                "the export is read-only",
            ));
        }
        Ok(())
    }
}

impl Drop for Remote {
    fn drop(&mut self) {
        for lane in &self.lanes {
            lane.close();
        }
    }
}

/// Whether it may work if one tries again: nobody answers while a server is started again.
fn is_worth_another_try(error: &ConnectError) -> bool {
    match error {
        ConnectError::Connect { .. } => true,
        ConnectError::Lost(fault) => fault.is_of_the_connection(),
        // A server that has just been started again may listen before it has its exports.
        ConnectError::NoExport(_) => true,
        ConnectError::Refused { error, .. } => *error == OptionError::Shutdown,
        _ => false,
    }
}

/// Whether nobody listens, or who listened has gone; not if he keeps silent.
fn is_away(error: &ConnectError) -> bool {
    match error {
        ConnectError::Connect { source, .. } => source.kind() != io::ErrorKind::TimedOut,
        ConnectError::Lost(fault) => fault.is_of_the_connection() && !fault.is_late(),
        _ => false,
    }
}

/// What a user of the storage is told.
impl From<ConnectError> for io::Error {
    fn from(error: ConnectError) -> Self {
        let kind = match &error {
            ConnectError::Connect { source, .. } => source.kind(),
            ConnectError::Lost(fault) => Self::from(fault.clone()).kind(),
            ConnectError::Changed(_) => io::ErrorKind::InvalidData,
            ConnectError::NoExport(_) => io::ErrorKind::NotFound,
            _ => io::ErrorKind::PermissionDenied,
        };
        Self::new(kind, error)
    }
}
