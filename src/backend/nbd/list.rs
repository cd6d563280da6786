//! Which exports a server has.

use std::time::Instant;

use super::hello::{Hello, Pace};
use super::tls::TlsConfig;
use super::{ConnectError, NbdUrl, RemoteOptions};
use crate::nbd::{
    BlockSizes, ClientOption, Export, Info, InfoKind, InfoQuery, MetaQuery, OptionCode, OptionReply,
};

/// The most exports that are listed, so that a server without end has one.
const EXPORTS: usize = 10_000;

/// How many exports are asked about at once: as many as a server reads without our having read any of its answers.
const AT_ONCE: usize = 16;

/// An export that a server has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedExport {
    /// Its name; empty for the server's default.
    pub name: String,
    /// A text for people; may be empty.
    pub description: String,
    /// Its size and what it can do; `None` if the server does not tell who does not use it, or refuses it.
    pub export: Option<Export>,
    /// The sizes that requests are to have, if it says.
    pub blocks: Option<BlockSizes>,
    /// What can be asked of its bytes.
    pub contexts: Vec<String>,
}

/// The exports of the server of `url`, whose own export does not matter.
///
/// # Errors
/// If nobody answers, the certificates do not fit, or the server does not list.
pub fn list(url: &NbdUrl, options: &RemoteOptions) -> Result<Vec<ListedExport>, ConnectError> {
    let tls = if url.tls() {
        Some(TlsConfig::new(&options.tls, url.place())?)
    } else {
        None
    };
    let deadline = Instant::now() + options.deadline;
    // A list is no page that somebody waits for: one step after the other works with all servers.
    let mut hello = Hello::dial(url, tls.as_ref(), Pace::Careful, deadline)?;
    let mut exports = names(&mut hello)?;
    // Names of contexts are told only to who knows structured replies.
    ask(&mut hello, &[ClientOption::StructuredReply])?;
    let structured = hello
        .answer(OptionCode::StructuredReply, |_| Ok(()))?
        .is_ok();
    for exports in exports.chunks_mut(AT_ONCE) {
        describe(&mut hello, exports, structured)?;
    }
    // A courtesy: the list is complete without the answer.
    let _ = ask(&mut hello, &[ClientOption::Abort]);
    Ok(exports)
}

fn ask(hello: &mut Hello, options: &[ClientOption]) -> Result<(), ConnectError> {
    let mut bytes = Vec::new();
    for option in options {
        option.encode(&mut bytes);
    }
    hello.send(&bytes)
}

fn names(hello: &mut Hello) -> Result<Vec<ListedExport>, ConnectError> {
    let mut exports = Vec::new();
    ask(hello, &[ClientOption::List])?;
    hello
        .answer_long(OptionCode::List, EXPORTS, |reply| {
            if let OptionReply::Server { name, details } = reply {
                exports.push(ListedExport {
                    name,
                    description: details,
                    export: None,
                    blocks: None,
                    contexts: Vec::new(),
                });
            }
            Ok(())
        })?
        .map_err(|(error, message)| ConnectError::Refused { error, message })?;
    Ok(exports)
}

/// Asks about some exports at once.
fn describe(
    hello: &mut Hello,
    exports: &mut [ListedExport],
    structured: bool,
) -> Result<(), ConnectError> {
    let mut options = Vec::new();
    for export in &*exports {
        let name = export.name.clone();
        let kinds = vec![InfoKind::Description, InfoKind::BlockSize];
        options.push(ClientOption::Info(InfoQuery { name, kinds }));
        if structured {
            let (name, queries) = (export.name.clone(), Vec::new());
            options.push(ClientOption::ListMetaContext(MetaQuery { name, queries }));
        }
    }
    ask(hello, &options)?;
    for export in exports {
        // An export that is refused, or a server that does not know the question, leaves what is known already.
        let _ = hello.answer(OptionCode::Info, |reply| {
            match reply {
                OptionReply::Info(Info::Export(told)) => export.export = Some(told),
                OptionReply::Info(Info::Description(text)) => export.description = text,
                OptionReply::Info(Info::BlockSize(sizes)) if sizes.are_valid() => {
                    export.blocks = Some(sizes);
                }
                _ => {}
            }
            Ok(())
        })?;
        if structured {
            let _ = hello.answer(OptionCode::ListMetaContext, |reply| {
                if let OptionReply::MetaContext { name, .. } = reply {
                    export.contexts.push(name);
                }
                Ok(())
            })?;
        }
    }
    Ok(())
}
