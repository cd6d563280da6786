//! Every fuzz target on stable: over its corpus, and over some inputs that were made from it.

/// The targets themselves, which are a crate of their own for `cargo fuzz`.
#[path = "../fuzz/src/lib.rs"]
pub mod targets;

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};

use memferry::nbd::{
    BlockStatus, ClientFlags, ClientOption, Command, CommandFlags, Errno, ErrorChunk, Extent,
    Greeting, HandshakeFlags, Hole, Info, InfoKind, InfoQuery, MetaQuery, OptionCode, OptionReply,
    Request, SimpleReply, encode_status_payload,
};
use targets::TARGETS;

fn corpus(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fuzz/corpus")
        .join(target)
}

/// The committed inputs of `target`, in the order of their names.
fn inputs(target: &str) -> Vec<Vec<u8>> {
    let mut paths: Vec<_> = std::fs::read_dir(corpus(target))
        .expect("every target has a corpus")
        .map(|entry| entry.expect("the corpus can be read").path())
        .collect();
    paths.sort();
    paths
        .iter()
        .map(|path| std::fs::read(path).expect("the corpus can be read"))
        .collect()
}

/// Xorshift, seeded by the target and the number of the input.
struct Chance(u64);

impl Chance {
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % end.max(1) as u64).expect("below a usize")
    }

    fn byte(&mut self) -> u8 {
        u8::try_from(self.below(256)).expect("below 256")
    }

    /// What a fuzzer does to an input, without its feedback.
    fn mutate(&mut self, inputs: &[Vec<u8>]) -> Vec<u8> {
        let mut input = inputs[self.below(inputs.len())].clone();
        for _ in 0..=self.below(4) {
            let at = self.below(input.len() + 1);
            match self.below(6) {
                0 => input.insert(at, self.byte()),
                1 if at < input.len() => {
                    input.remove(at);
                }
                2 => input.truncate(at),
                3 => {
                    let other = &inputs[self.below(inputs.len())];
                    let from = self.below(other.len() + 1);
                    input.extend_from_slice(&other[from..]);
                }
                _ if at < input.len() => {
                    let edge = [0, 1, 0x7F, 0x80, 0xFF, self.byte()];
                    input[at] = edge[self.below(edge.len())];
                }
                _ => {}
            }
        }
        input.truncate(4096);
        input
    }
}

fn run(name: &str, target: fn(&[u8]), input: &[u8]) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| target(input))) {
        println!("{name} fails on {input:02x?}");
        resume_unwind(panic);
    }
}

#[test]
fn no_input_of_the_corpus_breaks_a_target() {
    for (name, target) in TARGETS {
        for input in inputs(name) {
            run(name, target, &input);
        }
    }
}

#[test]
fn no_input_that_is_made_from_the_corpus_breaks_a_target() {
    for (name, target) in TARGETS {
        let inputs = inputs(name);
        // Those with a server take a connection each.
        let times = if name == "nbd_words" { 20_000 } else { 1500 };
        for seed in 1..=times {
            let mut chance = Chance(seed * 0x9E37_79B9 + name.len() as u64);
            run(name, target, &chance.mutate(&inputs));
        }
    }
}

/// The seeds are made by the encoder: `MEMFERRY_WRITE_CORPUS=1` writes them anew.
#[test]
fn the_corpus_holds_what_the_encoder_writes() {
    let write = std::env::var_os("MEMFERRY_WRITE_CORPUS").is_some();
    for (target, name, bytes) in seeds() {
        let path = corpus(target).join(name);
        if write {
            std::fs::create_dir_all(corpus(target)).expect("a folder");
            std::fs::write(&path, &bytes).expect("a file");
        }
        let committed = std::fs::read(&path).unwrap_or_default();
        assert_eq!(committed, bytes, "{}", path.display());
    }
}

type Seed = (&'static str, String, Vec<u8>);

fn seeds() -> Vec<Seed> {
    [words(), handshakes(), transmissions(), snapshots()].concat()
}

fn options() -> Vec<ClientOption> {
    let info = |name: &str| InfoQuery {
        name: name.into(),
        kinds: vec![InfoKind::BlockSize, InfoKind::Name],
    };
    let meta = |queries: &[&str]| MetaQuery {
        name: "a".into(),
        queries: queries.iter().map(|&query| query.to_owned()).collect(),
    };
    vec![
        ClientOption::List,
        ClientOption::StartTls,
        ClientOption::StructuredReply,
        ClientOption::ExtendedHeaders,
        ClientOption::ListMetaContext(meta(&[])),
        ClientOption::SetMetaContext(meta(&["base:allocation", "x:y"])),
        ClientOption::Info(info("b")),
        ClientOption::Unknown(99),
        ClientOption::Abort,
        ClientOption::ExportName("b".into()),
        ClientOption::Go(info("")),
    ]
}

fn words() -> Vec<Seed> {
    let mut words = Vec::new();
    let mut word = |which: u8, name: &str, bytes: &[u8]| {
        let bytes = [&[which], bytes].concat();
        words.push(("nbd_words", format!("{which}-{name}"), bytes));
    };
    let flags = HandshakeFlags::ALL;
    word(0, "greeting", &Greeting { flags }.encode());
    for option in options() {
        let mut bytes = Vec::new();
        option.encode(&mut bytes);
        let code = option.code().to_wire();
        word(1, &format!("header-{code}"), &bytes[..16]);
        let code_byte = u8::try_from(code).expect("a small number");
        let data = [&[code_byte], &bytes[16..]].concat();
        word(6, &format!("option-{code}"), &data);
    }
    for (name, reply) in [
        ("ack", OptionReply::Ack),
        ("info", OptionReply::Info(Info::Name("n".into()))),
        (
            "context",
            OptionReply::MetaContext {
                id: 1,
                name: "base:allocation".into(),
            },
        ),
        (
            "server",
            OptionReply::Server {
                name: "a".into(),
                details: "b".into(),
            },
        ),
    ] {
        let mut bytes = Vec::new();
        reply.encode(OptionCode::List, &mut bytes);
        word(2, name, &bytes[..20]);
        word(7, name, &[&bytes[12..16], &bytes[20..]].concat());
    }
    let read = request(Command::Read, 4096, 512);
    word(3, "request", &read.encode());
    word(4, "request", &read.encode_extended());
    let error = Some(Errno::Io);
    let reply = SimpleReply { error, cookie: 1 };
    word(8, "reply", &reply.encode());
    word(9, "hole", &Hole { offset: 1, len: 2 }.encode());
    let status = BlockStatus {
        context: 1,
        extents: vec![Extent { len: 9, flags: 3 }],
    };
    word(9, "status", &status.encode());
    word(9, "extended-status", &status.encode_extended());
    let error = ErrorChunk {
        error: Errno::Inval,
        message: "no".into(),
        offset: Some(5),
    };
    word(9, "error", &error.encode());
    word(9, "question", &encode_status_payload(9, &[1]));
    words
}

fn handshakes() -> Vec<Seed> {
    let mut seeds = Vec::new();
    let mut all = ClientFlags::ALL.encode().to_vec();
    for option in options() {
        let mut one = ClientFlags::ALL.encode().to_vec();
        option.encode(&mut one);
        let name = format!("option-{}", option.code().to_wire());
        seeds.push(("nbd_handshake", name, one));
        if option != ClientOption::Abort && !matches!(option, ClientOption::ExportName(_)) {
            option.encode(&mut all);
        }
    }
    all.extend_from_slice(&request(Command::Read, 0, 512).encode_extended());
    seeds.push(("nbd_handshake", "all".to_owned(), all));
    seeds
}

const fn request(command: Command, offset: u64, len: u64) -> Request {
    Request {
        flags: CommandFlags::NONE,
        command,
        cookie: offset + len,
        offset,
        len,
    }
}

fn transmissions() -> Vec<Seed> {
    let payload = [7; 600];
    let flagged = |flags, request| Request { flags, ..request };
    let requests = [
        request(Command::Write, 512, 600),
        request(Command::Read, 0, 5000),
        flagged(CommandFlags::DF, request(Command::Read, 1, 4999)),
        flagged(CommandFlags::FUA, request(Command::Write, 4000, 17)),
        request(Command::Trim, 4096, 8192),
        flagged(CommandFlags::NO_HOLE, request(Command::WriteZeroes, 0, 9)),
        request(Command::Cache, 0, 1 << 20),
        request(Command::BlockStatus, 0, 1 << 20),
        flagged(CommandFlags::REQ_ONE, request(Command::BlockStatus, 3, 99)),
        request(Command::Read, 1 << 20, 1),
        request(Command::Flush, 0, 0),
        request(Command::Unknown(77), 0, 0),
        request(Command::Disconnect, 0, 0),
    ];
    let mut seeds = Vec::new();
    for mode in 0_u8..3 {
        let mut all = vec![mode];
        for (at, request) in requests.iter().enumerate() {
            let mut bytes = match (mode, request.command) {
                (2, Command::Write) => {
                    let flags = request.flags.with(CommandFlags::PAYLOAD_LEN);
                    flagged(flags, *request).encode_extended().to_vec()
                }
                (2, _) => request.encode_extended().to_vec(),
                _ => request.encode().to_vec(),
            };
            if request.command == Command::Write {
                let len = usize::try_from(request.len).expect("a small number");
                bytes.extend_from_slice(&payload[..len]);
            }
            let one = [&[mode], bytes.as_slice()].concat();
            seeds.push(("nbd_transmission", format!("{mode}-{at:02}"), one));
            all.extend_from_slice(&bytes);
        }
        seeds.push(("nbd_transmission", format!("{mode}-all"), all));
    }
    let question = encode_status_payload(4096, &[1]);
    let flags = CommandFlags::PAYLOAD_LEN;
    let asks = request(Command::BlockStatus, 0, question.len() as u64);
    let asks = flagged(flags, asks).encode_extended();
    let asks = [&[2], asks.as_slice(), &question].concat();
    seeds.push(("nbd_transmission", "2-question".to_owned(), asks));
    seeds
}

fn snapshots() -> Vec<Seed> {
    let mapping = |address: u64, size: u64, offset: u64, page: u64| {
        format!(
            r#"{{"base_host_virt_addr":{address},"size":{size},"offset":{offset},"page_size":{page},"page_size_kib":{page}}}"#
        )
    };
    let one = mapping(1 << 46, 128 << 20, 0, 4096);
    // Below and above the hole of x86, in huge pages.
    let low = mapping(1 << 46, 3 << 30, 0, 2 << 20);
    let high = mapping(1 << 45, 1 << 30, 3 << 30, 2 << 20);
    let texts = [
        ("one", format!("[{one}]")),
        ("two", format!("[{low},{high}]")),
        ("overlap", format!("[{one},{one}]")),
        (
            "oldest",
            r#"[{"base_host_virt_addr":4096,"size":8192,"offset":0}]"#.to_owned(),
        ),
        (
            "later",
            format!(
                r#"[{}]"#,
                one.replace('}', r#","slot":[1,{"a":null}],"b":"\u00e9"}"#)
            ),
        ),
        ("spaces", format!(" [\n{one} ]\n\0")),
        ("more", format!("[{one}][{one}]")),
        ("none", "[]".to_owned()),
        ("foreign", "GET / HTTP/1.1\r\n\r\n".to_owned()),
    ];
    // Within a number a parser may take what has come for a wrong one.
    let within = |begun: &str, rest: &str| {
        let begun = format!(r#"[{{"x":{begun}"#);
        let text = format!(r#"{begun}{rest},"base_host_virt_addr":4096,"size":8192,"offset":0}}]"#);
        (begun.len(), text)
    };
    let cut_within = [
        ("cut-sign", within("-", "1")),
        ("cut-fraction", within("1.", "5")),
        ("cut-exponent", within("1e", "5")),
        ("cut-exponent-sign", within("-1.5E+", "05")),
        ("cut-surrogates", within(r#""\ud83d"#, r#"\ude00""#)),
        ("cut-literal", within("nu", "ll")),
        ("cut-number-alone", (1, "2e".to_owned())),
        (
            "cut-fraction-at-the-end",
            (26, r#"[{"base_host_virt6addr":4.9"#.to_owned()),
        ),
    ];
    texts
        .into_iter()
        .map(|(name, text)| (name, (text.len() / 2, text)))
        .chain(cut_within)
        .map(|(name, (cut, text))| {
            let cut = u8::try_from(cut).unwrap_or(u8::MAX);
            let bytes = [&[cut], text.as_bytes()].concat();
            ("snapshot_mappings", name.to_owned(), bytes)
        })
        .collect()
}
