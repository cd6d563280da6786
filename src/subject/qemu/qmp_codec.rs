//! QMP as lines of JSON: what a line from QEMU means, and how a command is spelled. No I/O.

use serde_json::{Map, Value, json};

/// A line longer than this is not read to its end. QEMU's longest replies (a QAPI schema) are under 1 MiB.
pub(super) const MAX_LINE: usize = 16 << 20;

/// How much of a line that cannot be read is quoted in the error.
const EXCERPT: usize = 120;

/// A QEMU version, as the greeting tells it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Version {
    /// The first number.
    pub major: u64,
    /// The second number.
    pub minor: u64,
    /// The third number.
    pub micro: u64,
    /// What the packager added, possibly nothing.
    pub package: String,
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

/// Something that QEMU says happened.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// For example `STOP`.
    pub name: String,
    /// What belongs to it; null where nothing does.
    pub data: Value,
    /// When, by QEMU's clock: microseconds since 1970. Zero where QEMU does not know.
    pub at_micros: u64,
}

impl Event {
    /// The status that a `MIGRATION` event tells, if it is one.
    #[must_use]
    pub fn migration_status(&self) -> Option<&str> {
        (self.name == "MIGRATION").then(|| self.data["status"].as_str())?
    }
}

/// One line from QEMU.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Message {
    Greeting(Version),
    Return {
        id: Option<u64>,
        value: Value,
    },
    Failure {
        id: Option<u64>,
        class: String,
        desc: String,
    },
    Event(Event),
}

/// Bytes that are not QMP.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    /// No line end within the limit.
    #[error("a line is longer than {MAX_LINE} bytes")]
    LineTooLong,
    /// A line that is no JSON object.
    #[error("a line is not JSON: {excerpt:?}")]
    NotJson {
        /// How the line begins.
        excerpt: String,
    },
    /// A JSON object that QMP does not have.
    #[error("an object is none of greeting, return, error and event: {excerpt:?}")]
    UnknownMessage {
        /// How the line begins.
        excerpt: String,
    },
}

/// Cuts bytes into messages.
#[derive(Debug, Default)]
pub(super) struct Decoder {
    buffer: Vec<u8>,
    /// What of `buffer` is known to hold no line end.
    searched: usize,
}

impl Decoder {
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole message, or `None` until more bytes are pushed. After an error the stream has lost its step.
    pub(super) fn next_message(&mut self) -> Result<Option<Message>, CodecError> {
        loop {
            let Some(end) = self.buffer[self.searched..]
                .iter()
                .position(|&byte| byte == b'\n')
                .map(|position| self.searched + position)
            else {
                self.searched = self.buffer.len();
                return if self.buffer.len() > MAX_LINE {
                    Err(CodecError::LineTooLong)
                } else {
                    Ok(None)
                };
            };
            let line: Vec<u8> = self.buffer.drain(..=end).collect();
            self.searched = 0;
            if line.len() > MAX_LINE {
                return Err(CodecError::LineTooLong);
            }
            if line.iter().all(u8::is_ascii_whitespace) {
                continue;
            }
            return parse(&line).map(Some);
        }
    }
}

/// A command as QEMU reads it.
pub(super) fn encode(id: u64, command: &str, arguments: &Value) -> Vec<u8> {
    let mut object = Map::new();
    object.insert("execute".into(), command.into());
    if !arguments.is_null() {
        object.insert("arguments".into(), arguments.clone());
    }
    object.insert("id".into(), id.into());
    let mut line = json!(object).to_string().into_bytes();
    line.push(b'\n');
    line
}

fn parse(line: &[u8]) -> Result<Message, CodecError> {
    let Ok(Value::Object(mut object)) = serde_json::from_slice(line) else {
        return Err(CodecError::NotJson {
            excerpt: excerpt(line),
        });
    };
    let id = object.get("id").and_then(Value::as_u64);
    if let Some(value) = object.remove("return") {
        return Ok(Message::Return { id, value });
    }
    if let Some(failure) = object.get("error") {
        return Ok(Message::Failure {
            id,
            class: text(&failure["class"]),
            desc: text(&failure["desc"]),
        });
    }
    if let Some(name) = object.get("event") {
        let time = object.get("timestamp").unwrap_or(&Value::Null);
        let seconds = time["seconds"].as_u64().unwrap_or(0);
        let micros = time["microseconds"].as_u64().unwrap_or(0);
        return Ok(Message::Event(Event {
            name: text(name),
            at_micros: seconds.saturating_mul(1_000_000).saturating_add(micros),
            data: object.remove("data").unwrap_or(Value::Null),
        }));
    }
    if let Some(greeting) = object.get("QMP") {
        let version = &greeting["version"];
        let number = |name: &str| version["qemu"][name].as_u64().unwrap_or(0);
        return Ok(Message::Greeting(Version {
            major: number("major"),
            minor: number("minor"),
            micro: number("micro"),
            package: text(&version["package"]),
        }));
    }
    Err(CodecError::UnknownMessage {
        excerpt: excerpt(line),
    })
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn excerpt(line: &[u8]) -> String {
    let line = &line[..line.len().min(EXCERPT)];
    String::from_utf8_lossy(line).trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Recorded from QEMU 7.2.22, as all lines below are.
    const GREETING: &[u8] = b"{\"QMP\": {\"version\": {\"qemu\": {\"micro\": 22, \"minor\": 2, \"major\": 7}, \"package\": \"Debian 1:7.2+dfsg-7+deb12u18+b3\"}, \"capabilities\": [\"oob\"]}}\r\n";

    fn decode(bytes: &[u8]) -> Result<Option<Message>, CodecError> {
        let mut decoder = Decoder::default();
        decoder.push(bytes);
        decoder.next_message()
    }

    #[test]
    fn the_greeting_tells_the_version() {
        let Ok(Some(Message::Greeting(version))) = decode(GREETING) else {
            panic!("no greeting");
        };
        assert_eq!(
            (version.to_string().as_str(), version.package.as_str()),
            ("7.2.22", "Debian 1:7.2+dfsg-7+deb12u18+b3")
        );
    }

    #[test]
    fn a_return_carries_its_id_and_value() {
        assert_eq!(
            decode(b"{\"return\": {\"enabled\": false, \"present\": true}, \"id\": 7}\r\n"),
            Ok(Some(Message::Return {
                id: Some(7),
                value: json!({"enabled": false, "present": true})
            }))
        );
    }

    #[test]
    fn an_error_carries_class_and_description() {
        assert_eq!(
            decode(b"{\"id\": 3, \"error\": {\"class\": \"GenericError\", \"desc\": \"Migration is not finalized yet\"}}\r\n"),
            Ok(Some(Message::Failure {
                id: Some(3),
                class: "GenericError".into(),
                desc: "Migration is not finalized yet".into()
            }))
        );
    }

    #[test]
    fn an_event_carries_data_and_time() {
        let line = b"{\"timestamp\": {\"seconds\": 1795210546, \"microseconds\": 267072}, \"event\": \"MIGRATION\", \"data\": {\"status\": \"pre-switchover\"}}\r\n";
        let Ok(Some(Message::Event(event))) = decode(line) else {
            panic!("no event");
        };
        assert_eq!(
            (event.migration_status(), event.at_micros),
            (Some("pre-switchover"), 1_795_210_546_267_072)
        );
    }

    #[test]
    fn bytes_may_be_cut_anywhere() {
        let event =
            b"{\"timestamp\": {\"seconds\": 1, \"microseconds\": 0}, \"event\": \"STOP\"}\r\n";
        let mut decoder = Decoder::default();
        let mut found = Vec::new();
        for byte in GREETING.iter().chain(event) {
            decoder.push(&[*byte]);
            found.extend(decoder.next_message().unwrap());
        }
        assert!(matches!(
            &found[..],
            [Message::Greeting(_), Message::Event(_)]
        ));
    }

    #[test]
    fn what_is_not_json_is_quoted() {
        assert_eq!(
            decode(b"SSH-2.0-OpenSSH_9.2\r\n"),
            Err(CodecError::NotJson {
                excerpt: "SSH-2.0-OpenSSH_9.2".into()
            })
        );
    }

    #[test]
    fn an_object_of_another_protocol_is_refused() {
        assert!(matches!(
            decode(b"{\"jsonrpc\": \"2.0\"}\n"),
            Err(CodecError::UnknownMessage { .. })
        ));
    }

    #[test]
    fn a_line_without_end_is_refused_at_the_limit() {
        assert_eq!(
            decode(&vec![b' '; MAX_LINE + 1]),
            Err(CodecError::LineTooLong)
        );
    }

    #[test]
    fn a_command_is_one_line_with_its_id() {
        let line = encode(5, "migrate", &json!({"uri": "fd:x"}));
        assert_eq!(line.last(), Some(&b'\n'));
        assert_eq!(
            serde_json::from_slice::<Value>(&line).unwrap(),
            json!({"execute": "migrate", "arguments": {"uri": "fd:x"}, "id": 5})
        );
    }
}
