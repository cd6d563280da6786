//! Every message, its tag and its fields. The table in `docs/protocol.md` mirrors this file.

use alloc::string::String;
use alloc::vec::Vec;

use crate::chunk::ChunkRun;
use crate::coding::{Reader, Writer};
use crate::dirty::DirtyPage;
use crate::error::{AbortCode, DecodeError};
use crate::handover::Token;
use crate::hello::Hello;
use crate::limits::{MAX_BODY, MAX_CHUNKS, MAX_CHUNKS_IN_FRAME, MAX_REASON, MAX_RUNS, MAX_STATE};

/// What one side says to the other.
///
/// A message with a payload ([`Chunks`](Self::Chunks), [`State`](Self::State), [`Digests`](Self::Digests), [`Offer`](Self::Offer)) is
/// the fields only; the payload follows it in the frame and never passes through this type.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// Both sides, first: who they are.
    Hello(Hello),
    /// Leecher: it is prepared; so many bytes of chunks may be in flight at once.
    Accept {
        /// The window in bytes over all lanes.
        window: u64,
    },
    /// Either side, before Release: the session ends, the source runs on.
    Abort {
        /// Why, for programs.
        code: AbortCode,
        /// Why, for people.
        reason: String,
    },
    /// Leecher: all frames of a lane up to a number are dealt with.
    Credit {
        /// The lane; 0 is the urgent one.
        lane: u8,
        /// Sequence number of the last frame that was dealt with.
        sequence: u64,
    },
    /// Seeder: a part of the next round's dirty set.
    Dirty {
        /// The round that the set begins.
        round: u32,
        /// Pages of the set.
        pages: Vec<DirtyPage>,
    },
    /// Seeder: the dirty set is complete and its round begins: those chunks are remote again.
    Round {
        /// The round.
        round: u32,
        /// How many chunks the set has.
        chunks: u64,
    },
    /// Seeder: chunks.
    Chunks(Chunks),
    /// Leecher: send these now.
    Fetch {
        /// The chunks.
        run: ChunkRun,
    },
    /// Seeder: what is remote now is fetched on demand, and nothing is overwritten any more.
    Finalize,
    /// Seeder: a piece of device state, which is the payload.
    State {
        /// Where the piece begins in the state, in bytes.
        offset: u64,
    },
    /// Seeder: the device state is complete and so is the dirty set.
    StateEnd {
        /// Length of the state in bytes.
        len: u64,
        /// Its digest.
        digest: u64,
    },
    /// Leecher: the state is loaded, the subject could run.
    Ready,
    /// Seeder: ownership passes.
    Release {
        /// The token of the session.
        token: Token,
    },
    /// Leecher: the subject runs here.
    Running,
    /// Leecher: no chunk is remote any more.
    Complete,
    /// Leecher: digests of chunks as they were installed; the payload is one `u64` a chunk, 0 where unknown.
    Digests {
        /// The first chunk.
        first: u64,
    },
    /// Leecher: all digests were sent.
    DigestsEnd,
    /// Seeder: what comparing the digests showed.
    Verdict {
        /// How many chunks were compared.
        compared: u64,
        /// How many differ.
        different: u64,
    },
    /// Seeder: the session is over. After a dry run: nothing was changed.
    Farewell,
    /// Either side: still there?
    Ping,
    /// The answer.
    Pong,
    /// Seeder, in a dry run: bytes to measure the link with, which are the payload.
    Probe,
    /// Leecher, if [`capability::KEEP`](crate::capability::KEEP) was agreed: the digests of what it has are made with this key.
    Keep {
        /// A key of BLAKE3, random for each session.
        key: [u8; 32],
    },
    /// Leecher: digests of chunks that it has, ascending; the payload is 16 bytes a chunk.
    Offer {
        /// The first chunk.
        first: u64,
    },
    /// Leecher: it has no more.
    OfferEnd,
    /// Leecher, if [`capability::CUT_OVER`](crate::capability::CUT_OVER) was agreed: its user wants to cut over now.
    CutOver,
}

/// The fields of a frame of chunks.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Chunks {
    /// The lane's number of this frame: 1, 2, 3, …
    pub sequence: u64,
    /// The round in which the chunks were read.
    pub round: u32,
    /// The runs, in the order of their bytes in the payload.
    pub runs: Vec<Run>,
    /// A digest for each chunk of the [`Content::Data`] runs, in order.
    pub digests: Vec<u64>,
}

/// A run of chunks of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Which chunks.
    pub run: ChunkRun,
    /// What they hold.
    pub content: Content,
}

/// What the chunks of a run hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// Their bytes are in the payload.
    Data,
    /// Nothing but zeros.
    Zero,
    /// What the leecher has offered.
    Kept,
}

impl Message {
    /// The tag of the message in a frame.
    #[must_use]
    pub fn tag(&self) -> u8 {
        match self {
            Self::Hello(_) => 1,
            Self::Accept { .. } => 2,
            Self::Abort { .. } => 3,
            Self::Credit { .. } => 4,
            Self::Dirty { .. } => 5,
            Self::Round { .. } => 6,
            Self::Chunks(_) => 7,
            Self::Fetch { .. } => 8,
            Self::Finalize => 9,
            Self::State { .. } => 10,
            Self::StateEnd { .. } => 11,
            Self::Ready => 12,
            Self::Release { .. } => 13,
            Self::Running => 14,
            Self::Complete => 15,
            Self::Digests { .. } => 16,
            Self::DigestsEnd => 17,
            Self::Verdict { .. } => 18,
            Self::Farewell => 19,
            Self::Ping => 20,
            Self::Pong => 21,
            Self::Probe => 22,
            Self::Keep { .. } => 23,
            Self::Offer { .. } => 24,
            Self::OfferEnd => 25,
            Self::CutOver => 26,
        }
    }

    /// What the message is called in errors and in `docs/protocol.md`.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Hello(_) => "Hello",
            Self::Accept { .. } => "Accept",
            Self::Abort { .. } => "Abort",
            Self::Credit { .. } => "Credit",
            Self::Dirty { .. } => "Dirty",
            Self::Round { .. } => "Round",
            Self::Chunks(_) => "Chunks",
            Self::Fetch { .. } => "Fetch",
            Self::Finalize => "Finalize",
            Self::State { .. } => "State",
            Self::StateEnd { .. } => "StateEnd",
            Self::Ready => "Ready",
            Self::Release { .. } => "Release",
            Self::Running => "Running",
            Self::Complete => "Complete",
            Self::Digests { .. } => "Digests",
            Self::DigestsEnd => "DigestsEnd",
            Self::Verdict { .. } => "Verdict",
            Self::Farewell => "Farewell",
            Self::Ping => "Ping",
            Self::Pong => "Pong",
            Self::Probe => "Probe",
            Self::Keep { .. } => "Keep",
            Self::Offer { .. } => "Offer",
            Self::OfferEnd => "OfferEnd",
            Self::CutOver => "CutOver",
        }
    }

    /// Whether a payload may follow.
    #[must_use]
    pub fn carries_payload(tag: u8) -> bool {
        matches!(tag, 7 | 10 | 16 | 22 | 24)
    }

    /// Splits `pages` into as few messages as their bodies allow.
    pub fn dirty(round: u32, pages: impl Iterator<Item = DirtyPage>) -> Vec<Self> {
        let room = MAX_BODY as usize - 6;
        let mut messages = Vec::new();
        let mut batch = Vec::new();
        let mut used = 0;
        for page in pages {
            let len = page.encoded_len();
            if used + len > room {
                messages.push(Self::Dirty {
                    round,
                    pages: core::mem::take(&mut batch),
                });
                used = 0;
            }
            used += len;
            batch.push(page);
        }
        if !batch.is_empty() {
            messages.push(Self::Dirty {
                round,
                pages: batch,
            });
        }
        messages
    }

    /// Appends the fields to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::Hello(hello) => hello.encode(out),
            Self::Accept { window } => out.put_u64(*window),
            Self::Abort { code, reason } => {
                out.put_u16(code.to_wire());
                out.put_text(reason, MAX_REASON);
            }
            Self::Credit { lane, sequence } => {
                out.put_u8(*lane);
                out.put_u64(*sequence);
            }
            Self::Dirty { round, pages } => {
                out.put_u32(*round);
                out.put_u16(u16::try_from(pages.len()).expect("a body holds fewer"));
                for page in pages {
                    page.encode(out);
                }
            }
            Self::Round { round, chunks } => {
                out.put_u32(*round);
                out.put_u64(*chunks);
            }
            Self::Chunks(chunks) => chunks.encode(out),
            Self::Fetch { run } => put_run(out, *run),
            Self::State { offset } => out.put_u64(*offset),
            Self::StateEnd { len, digest } => {
                out.put_u64(*len);
                out.put_u64(*digest);
            }
            Self::Release { token } => out.extend_from_slice(&token.0),
            Self::Digests { first } | Self::Offer { first } => out.put_u64(*first),
            Self::Keep { key } => out.extend_from_slice(key),
            Self::Verdict {
                compared,
                different,
            } => {
                out.put_u64(*compared);
                out.put_u64(*different);
            }
            Self::Finalize
            | Self::Ready
            | Self::Running
            | Self::Complete
            | Self::DigestsEnd
            | Self::Farewell
            | Self::Ping
            | Self::Pong
            | Self::Probe
            | Self::OfferEnd
            | Self::CutOver => {}
        }
    }

    /// Reads the fields of the message with this tag.
    ///
    /// # Errors
    /// If the tag is unknown or the body is not what [`encode`](Self::encode) writes.
    pub fn decode(tag: u8, body: &[u8]) -> Result<Self, DecodeError> {
        let mut reader = Reader::new(body);
        let r = &mut reader;
        let message = match tag {
            // A later version appends fields to Hello, so that both can find out that they differ.
            1 => return Hello::decode(r).map(Self::Hello),
            2 => Self::Accept { window: r.u64()? },
            3 => Self::Abort {
                code: AbortCode::from_wire(r.u16()?),
                reason: r.text(MAX_REASON)?,
            },
            4 => Self::Credit {
                lane: r.u8()?,
                sequence: r.u64()?,
            },
            5 => {
                let round = r.u32()?;
                let count = r.count(5)?;
                let pages = (0..count)
                    .map(|_| DirtyPage::decode(r))
                    .collect::<Result<_, _>>()?;
                Self::Dirty { round, pages }
            }
            6 => Self::Round {
                round: r.u32()?,
                chunks: r.u64()?,
            },
            7 => Self::Chunks(Chunks::decode(r)?),
            8 => Self::Fetch { run: run(r)? },
            9 => Self::Finalize,
            10 => Self::State { offset: r.u64()? },
            11 => {
                let (len, digest) = (r.u64()?, r.u64()?);
                if len > MAX_STATE {
                    return Err(DecodeError::InvalidValue {
                        field: "state length",
                    });
                }
                Self::StateEnd { len, digest }
            }
            12 => Self::Ready,
            13 => Self::Release {
                token: Token(r.array()?),
            },
            14 => Self::Running,
            15 => Self::Complete,
            16 => Self::Digests { first: r.u64()? },
            17 => Self::DigestsEnd,
            18 => Self::Verdict {
                compared: r.u64()?,
                different: r.u64()?,
            },
            19 => Self::Farewell,
            20 => Self::Ping,
            21 => Self::Pong,
            22 => Self::Probe,
            23 => Self::Keep { key: r.array()? },
            24 => Self::Offer { first: r.u64()? },
            25 => Self::OfferEnd,
            26 => Self::CutOver,
            tag => return Err(DecodeError::UnknownTag { tag }),
        };
        reader.finish()?;
        Ok(message)
    }
}

impl Chunks {
    /// How many chunks have their bytes in the payload.
    #[must_use]
    pub fn data_chunks(&self) -> u64 {
        self.runs
            .iter()
            .filter(|run| run.content == Content::Data)
            .map(|run| run.run.count)
            .sum()
    }

    fn encode(&self, out: &mut Vec<u8>) {
        out.put_u64(self.sequence);
        out.put_u32(self.round);
        out.put_u16(u16::try_from(self.runs.len()).expect("limited when it was made"));
        for run in &self.runs {
            put_run(out, run.run);
            out.put_u8(match run.content {
                Content::Data => 0,
                Content::Zero => 1,
                Content::Kept => 2,
            });
        }
        for &digest in &self.digests {
            out.put_u64(digest);
        }
    }

    fn decode(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let invalid = |field| DecodeError::InvalidValue { field };
        let (sequence, round) = (r.u64()?, r.u32()?);
        let count = r.count(17)?;
        if count > MAX_RUNS {
            return Err(invalid("number of runs"));
        }
        let mut chunks = Self {
            sequence,
            round,
            runs: Vec::with_capacity(count),
            digests: Vec::new(),
        };
        for _ in 0..count {
            let run = run(r)?;
            let content = match r.u8()? {
                0 => Content::Data,
                1 => Content::Zero,
                2 => Content::Kept,
                _ => return Err(invalid("content")),
            };
            chunks.runs.push(Run { run, content });
        }
        // Each run is below MAX_CHUNKS and there are at most MAX_RUNS of them: the sum fits.
        let data = chunks.data_chunks();
        if data > MAX_CHUNKS_IN_FRAME {
            return Err(invalid("number of chunks"));
        }
        chunks.digests = (0..data).map(|_| r.u64()).collect::<Result<_, _>>()?;
        Ok(chunks)
    }
}

fn put_run(out: &mut Vec<u8>, run: ChunkRun) {
    out.put_u64(run.start.0);
    out.put_u64(run.count);
}

fn run(r: &mut Reader<'_>) -> Result<ChunkRun, DecodeError> {
    let (start, count) = (r.u64()?, r.u64()?);
    if start >= MAX_CHUNKS || count > MAX_CHUNKS {
        return Err(DecodeError::InvalidValue { field: "chunk run" });
    }
    Ok(ChunkRun::new(start, count))
}
