//! `nbd://host:port/export` and its relatives: where an export is.

use std::ffi::OsString;
use std::fmt;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// The port that network block devices have.
const PORT: u16 = 10809;

/// The longest name of an export: the protocol's limit for any string.
const LONGEST_EXPORT: usize = 4096;

/// The longest path of a Unix socket: what the kernel's address has room for, and a zero.
const LONGEST_SOCKET: usize = 107;

/// Where an export is, and whether one speaks TLS to it.
///
/// ```text
/// nbd://HOST[:PORT]/EXPORT                  nbds://…      over TCP
/// nbd+unix:///EXPORT?socket=PATH            nbds+unix:…   over a Unix socket
/// ```
///
/// An IPv6 address stands in brackets; everything is percent-encoded; no export is the one whose name is empty, the
/// server's default. A value that exists can be printed and parsed again.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct NbdUrl {
    place: NbdPlace,
    export: String,
    tls: bool,
}

/// Where a server listens.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum NbdPlace {
    /// A port of a host.
    Tcp {
        /// Its name or address; an IPv6 address without brackets.
        host: String,
        /// The port.
        port: u16,
    },
    /// A Unix socket.
    Unix(PathBuf),
}

/// Why a text is no [`NbdUrl`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NbdUrlError {
    /// It begins with something else.
    #[error(
        "it begins with none of nbd://, nbds://, nbd+unix:// and nbds+unix://: write nbd://HOST/EXPORT, or \
         nbd+unix:///EXPORT?socket=PATH"
    )]
    Scheme,
    /// There is no host.
    #[error("it names no host: write nbd://HOST/EXPORT")]
    NoHost,
    /// The host has letters that no name or address has.
    #[error("{0:?} is no host: a name, an IPv4 address, or an IPv6 address in brackets, as [::1]")]
    Host(String),
    /// A Unix socket has no host.
    #[error(
        "{0:?} stands where a Unix socket has no host: write three slashes, nbd+unix:///EXPORT?socket=PATH"
    )]
    UnixHost(String),
    /// A user, which only keys that are shared beforehand would need.
    #[error(
        "it names a user, as is done for keys shared beforehand; only certificates are known here: leave `USER@` out"
    )]
    User,
    /// The port is no number of a port.
    #[error("{0:?} is no port: a number from 1 to 65535")]
    Port(String),
    /// `socket=` is missing.
    #[error("it does not say which socket: end it with ?socket=PATH")]
    NoSocket,
    /// The path of the socket cannot be one.
    #[error(
        "the path of the socket is empty, has a zero in it, or is longer than {LONGEST_SOCKET} bytes, which is the kernel's limit"
    )]
    Socket,
    /// A parameter that nothing is known of.
    #[error(
        "the parameter {0:?} is not known; only `socket` is, once, with nbd+unix and nbds+unix"
    )]
    Parameter(String),
    /// A percent sign that two hexadecimal digits do not follow.
    #[error(
        "a percent sign without two hexadecimal digits behind it: write %25 for the sign itself"
    )]
    Percent,
    /// The name of the export is no text, or too long.
    #[error("the name of the export is no UTF-8, or longer than {LONGEST_EXPORT} bytes")]
    Export,
    /// Something behind a number sign.
    #[error("it has a part behind `#`, which means nothing here: write %23 for the sign itself")]
    Fragment,
}

impl NbdUrl {
    /// An export of a server that listens at a port.
    ///
    /// # Errors
    /// If the host is empty or can be none, or the name of the export is too long.
    pub fn tcp(host: &str, port: u16, export: &str) -> Result<Self, NbdUrlError> {
        check_host(host)?;
        if port == 0 {
            return Err(NbdUrlError::Port(port.to_string()));
        }
        let host = host.to_owned();
        Self::at(NbdPlace::Tcp { host, port }, export)
    }

    /// An export of a server that listens at a Unix socket.
    ///
    /// # Errors
    /// If the path can be none of a socket, or the name of the export is too long.
    pub fn unix(socket: impl Into<PathBuf>, export: &str) -> Result<Self, NbdUrlError> {
        let socket = socket.into();
        let bytes = socket.as_os_str().as_bytes();
        if bytes.is_empty() || bytes.len() > LONGEST_SOCKET || bytes.contains(&0) {
            return Err(NbdUrlError::Socket);
        }
        Self::at(NbdPlace::Unix(socket), export)
    }

    fn at(place: NbdPlace, export: &str) -> Result<Self, NbdUrlError> {
        if export.len() > LONGEST_EXPORT {
            return Err(NbdUrlError::Export);
        }
        Ok(Self {
            place,
            export: export.to_owned(),
            tls: false,
        })
    }

    /// The same, with TLS or without.
    #[must_use]
    pub fn with_tls(self, tls: bool) -> Self {
        Self { tls, ..self }
    }

    /// The same place, and another export of it.
    ///
    /// # Errors
    /// If the name is too long.
    pub fn with_export(self, export: &str) -> Result<Self, NbdUrlError> {
        let tls = self.tls;
        Ok(Self::at(self.place, export)?.with_tls(tls))
    }

    /// Where the server listens.
    #[must_use]
    pub fn place(&self) -> &NbdPlace {
        &self.place
    }

    /// The name of the export; empty for the server's default.
    #[must_use]
    pub fn export(&self) -> &str {
        &self.export
    }

    /// Whether TLS is spoken: if so, nothing is said without.
    #[must_use]
    pub fn tls(&self) -> bool {
        self.tls
    }
}

impl FromStr for NbdUrl {
    type Err = NbdUrlError;

    fn from_str(text: &str) -> Result<Self, NbdUrlError> {
        let (scheme, rest) = text.split_once("://").ok_or(NbdUrlError::Scheme)?;
        let (unix, tls) = match scheme.to_ascii_lowercase().as_str() {
            "nbd" => (false, false),
            "nbds" => (false, true),
            "nbd+unix" => (true, false),
            "nbds+unix" => (true, true),
            _ => return Err(NbdUrlError::Scheme),
        };
        if rest.contains('#') {
            return Err(NbdUrlError::Fragment);
        }
        let (rest, query) = rest
            .split_once('?')
            .map_or((rest, None), |(rest, query)| (rest, Some(query)));
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        let export = String::from_utf8(decode(path)?).map_err(|_| NbdUrlError::Export)?;
        let socket = parse_query(query, unix)?;
        let url = if unix {
            if !authority.is_empty() {
                return Err(NbdUrlError::UnixHost(authority.to_owned()));
            }
            let socket = socket.ok_or(NbdUrlError::NoSocket)?;
            Self::unix(OsString::from_vec(socket), &export)?
        } else {
            let (host, port) = parse_authority(authority)?;
            Self::tcp(&host, port, &export)?
        };
        Ok(url.with_tls(tls))
    }
}

impl fmt::Display for NbdUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tls = if self.tls { "s" } else { "" };
        let export = Encoded(self.export.as_bytes());
        match &self.place {
            NbdPlace::Tcp { host, port } => {
                write!(f, "nbd{tls}://")?;
                if host.contains(':') {
                    write!(f, "[{}]", Encoded(host.as_bytes()))?;
                } else {
                    write!(f, "{}", Encoded(host.as_bytes()))?;
                }
                if *port != PORT {
                    write!(f, ":{port}")?;
                }
                write!(f, "/{export}")
            }
            NbdPlace::Unix(socket) => {
                let socket = Encoded(socket.as_os_str().as_bytes());
                write!(f, "nbd{tls}+unix:///{export}?socket={socket}")
            }
        }
    }
}

impl NbdPlace {
    /// The path of the socket, if it is one.
    #[must_use]
    pub fn socket(&self) -> Option<&Path> {
        match self {
            Self::Unix(socket) => Some(socket),
            Self::Tcp { .. } => None,
        }
    }
}

impl fmt::Display for NbdPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "{host}:{port}"),
            Self::Unix(socket) => write!(f, "{}", socket.display()),
        }
    }
}

/// The value of `socket`, the one parameter there is.
fn parse_query(query: Option<&str>, unix: bool) -> Result<Option<Vec<u8>>, NbdUrlError> {
    let mut socket = None;
    for parameter in query.unwrap_or_default().split('&') {
        if parameter.is_empty() {
            continue;
        }
        let (name, value) = parameter.split_once('=').unwrap_or((parameter, ""));
        if name != "socket" || !unix || socket.is_some() {
            return Err(NbdUrlError::Parameter(name.to_owned()));
        }
        socket = Some(decode(value)?);
    }
    Ok(socket)
}

fn parse_authority(authority: &str) -> Result<(String, u16), NbdUrlError> {
    if authority.contains('@') {
        return Err(NbdUrlError::User);
    }
    let bad = || NbdUrlError::Host(authority.to_owned());
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => {
            let (host, rest) = rest.split_once(']').ok_or_else(bad)?;
            if !host.contains(':') {
                return Err(bad());
            }
            let port = match rest.strip_prefix(':') {
                Some(port) => Some(port),
                None if rest.is_empty() => None,
                None => return Err(bad()),
            };
            (host, port)
        }
        None => match authority.split_once(':') {
            // More than one: an IPv6 address without brackets, whose port nobody could tell from its last part.
            Some((_, port)) if port.contains(':') => return Err(bad()),
            Some((host, port)) => (host, Some(port)),
            None => (authority, None),
        },
    };
    let host = String::from_utf8(decode(host)?).map_err(|_| bad())?;
    let port = match port {
        None | Some("") => PORT,
        Some(digits) if digits.bytes().all(|byte| byte.is_ascii_digit()) => digits
            .parse()
            .map_err(|_| NbdUrlError::Port(digits.to_owned()))?,
        Some(other) => return Err(NbdUrlError::Port(other.to_owned())),
    };
    Ok((host, port))
}

fn check_host(host: &str) -> Result<(), NbdUrlError> {
    if host.is_empty() {
        return Err(NbdUrlError::NoHost);
    }
    // Names of other scripts are left to the resolver; what separates the parts of a URL, and what no terminal shows, is in none.
    let odd =
        |letter: char| letter.is_whitespace() || letter.is_control() || "/?#@[]".contains(letter);
    // A name has no colon; an IPv6 address may be followed by the interface that it is meant for.
    let address = host.split_once('%').map_or(host, |(address, _)| address);
    let colons = host.contains(':') && address.parse::<std::net::Ipv6Addr>().is_err();
    if host.contains(odd) || colons {
        return Err(NbdUrlError::Host(host.to_owned()));
    }
    Ok(())
}

fn decode(text: &str) -> Result<Vec<u8>, NbdUrlError> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let mut digit = || {
            let digit = char::from(rest.next()?).to_digit(16)?;
            u8::try_from(digit).ok()
        };
        match (digit(), digit()) {
            (Some(high), Some(low)) => bytes.push(high << 4 | low),
            _ => return Err(NbdUrlError::Percent),
        }
    }
    Ok(bytes)
}

/// Bytes as they stand in a URL.
struct Encoded<'a>(&'a [u8]);

impl fmt::Display for Encoded<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for &byte in self.0 {
            if byte.is_ascii_alphanumeric() || b"-._~/:".contains(&byte) {
                write!(f, "{}", char::from(byte))?;
            } else {
                write!(f, "%{byte:02X}")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn tcp(host: &str, port: u16, export: &str) -> NbdUrl {
        NbdUrl::tcp(host, port, export).unwrap()
    }

    #[test]
    fn every_form_is_understood_and_printed_the_short_way() {
        let unix = |path: &str, export| NbdUrl::unix(path, export).unwrap();
        let cases = [
            (
                "nbd://example.com/disk",
                tcp("example.com", PORT, "disk"),
                None,
            ),
            (
                "nbd://example.com",
                tcp("example.com", PORT, ""),
                Some("nbd://example.com/"),
            ),
            (
                "NBD://example.com:10809/",
                tcp("example.com", PORT, ""),
                Some("nbd://example.com/"),
            ),
            (
                "nbds://10.0.0.1:99/a/b",
                tcp("10.0.0.1", 99, "a/b").with_tls(true),
                None,
            ),
            (
                "nbd://[::1]:1/%C3%A4%20?",
                tcp("::1", 1, "ä "),
                Some("nbd://[::1]:1/%C3%A4%20"),
            ),
            (
                "nbd://[fe80::1%25eth0]/",
                tcp("fe80::1%eth0", PORT, ""),
                None,
            ),
            ("nbd://h//x", tcp("h", PORT, "/x"), None),
            (
                "nbd+unix:///?socket=/run/a%20b.sock",
                unix("/run/a b.sock", ""),
                None,
            ),
            (
                "nbds+unix:///x?socket=nbd.sock",
                unix("nbd.sock", "x").with_tls(true),
                None,
            ),
            (
                "nbd+unix://?socket=a%3Fb",
                unix("a?b", ""),
                Some("nbd+unix:///?socket=a%3Fb"),
            ),
        ];
        for (text, url, printed) in cases {
            assert_eq!(text.parse(), Ok(url.clone()), "{text}");
            assert_eq!(url.to_string(), printed.unwrap_or(text));
        }
    }

    #[test]
    fn what_is_wrong_is_said() {
        use NbdUrlError as E;
        let long = format!("nbd://h/{}", "x".repeat(LONGEST_EXPORT + 1));
        let long_socket = format!("nbd+unix:///?socket=/{}", "x".repeat(LONGEST_SOCKET));
        let cases = [
            ("", E::Scheme),
            ("/dev/nbd0", E::Scheme),
            ("http://h/", E::Scheme),
            ("nbd:///x", E::NoHost),
            ("nbd://:1/x", E::NoHost),
            ("nbd://me@h/x", E::User),
            ("nbd://h:0/", E::Port("0".into())),
            ("nbd://h:65536/", E::Port("65536".into())),
            ("nbd://h:+1/", E::Port("+1".into())),
            ("nbd://::1/", E::Host("::1".into())),
            ("nbd://[::1/", E::Host("[::1".into())),
            ("nbd://[::1]x/", E::Host("[::1]x".into())),
            ("nbd://[h]/", E::Host("[h]".into())),
            ("nbd://a%20b/", E::Host("a b".into())),
            ("nbd://h/x?socket=/a", E::Parameter("socket".into())),
            (
                "nbd://h/x?tls-psk-file=k",
                E::Parameter("tls-psk-file".into()),
            ),
            ("nbd+unix:///x", E::NoSocket),
            ("nbd+unix:///x?socket=", E::Socket),
            ("nbd+unix:///x?socket=a%00b", E::Socket),
            (
                "nbd+unix:///x?socket=a&socket=b",
                E::Parameter("socket".into()),
            ),
            ("nbd+unix://h/x?socket=a", E::UnixHost("h".into())),
            ("nbd://h/%", E::Percent),
            ("nbd://h/%4", E::Percent),
            ("nbd://h/%zz", E::Percent),
            ("nbd://h/%ff", E::Export),
            ("nbd://h/a#b", E::Fragment),
            (&long, E::Export),
            (&long_socket, E::Socket),
        ];
        for (text, error) in cases {
            assert_eq!(text.parse::<NbdUrl>(), Err(error), "{text}");
        }
    }

    fn host() -> impl Strategy<Value = String> {
        prop_oneof![
            "[a-z0-9.-]{1,20}",
            any::<std::net::Ipv6Addr>().prop_map(|address| address.to_string()),
            any::<std::net::Ipv4Addr>().prop_map(|address| address.to_string()),
            "[%+&=ä]{1,4}",
        ]
    }

    proptest! {
        #[test]
        fn what_is_printed_is_parsed_to_the_same(
            host in host(), port in 1_u16.., export in any::<String>(), tls: bool,
        ) {
            let url = NbdUrl::tcp(&host, port, &export).unwrap().with_tls(tls);
            prop_assert_eq!(url.to_string().parse(), Ok(url));
        }

        #[test]
        fn a_socket_of_any_bytes_is_printed_and_parsed_to_the_same(
            path in proptest::collection::vec(1_u8.., 1..LONGEST_SOCKET), export in any::<String>(), tls: bool,
        ) {
            let url = NbdUrl::unix(OsString::from_vec(path), &export).unwrap().with_tls(tls);
            prop_assert_eq!(url.to_string().parse(), Ok(url));
        }

        #[test]
        fn no_text_is_too_odd_to_be_refused(text in any::<String>(), tail in "[:/?#@%a-f0-9\\[\\]=&]{0,20}") {
            for text in [text, format!("nbd://{tail}"), format!("nbd+unix://{tail}")] {
                if let Ok(url) = text.parse::<NbdUrl>() {
                    prop_assert_eq!(url.to_string().parse(), Ok(url));
                }
            }
        }
    }
}
