//! What a server says to options: a function of the options, without input or output.

use super::answer::Agreed;
use super::export::{Context, Export};
use crate::nbd::{
    self, ClientOption, DecodeError, Info, InfoKind, InfoQuery, MetaQuery, OldExport, OptionCode,
    OptionError, OptionReply,
};

/// Whether TLS is spoken.
#[cfg_attr(
    not(feature = "tls"),
    expect(dead_code, reason = "nothing but `Off` is without TLS")
)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Security {
    /// Never.
    Off,
    /// If the client wants.
    Offered,
    /// Or nothing at all is told.
    Required,
    /// It is spoken now.
    Established,
}

/// What happens after an option.
#[derive(Debug)]
pub(super) enum Next {
    /// The next option.
    Option,
    /// Hands are shaken, and all begins anew.
    StartTls,
    /// The transmission phase.
    Serve(Box<Export>),
    /// The end.
    Close,
}

/// A handshake under way.
#[derive(Debug)]
pub(super) struct Negotiation {
    security: Security,
    /// The client does not want 124 zeros.
    no_zeroes: bool,
    structured: bool,
    extended: bool,
    /// The contexts that were chosen, and for which export.
    contexts: Option<(String, Vec<Context>)>,
}

impl Negotiation {
    pub(super) fn new(security: Security, no_zeroes: bool) -> Self {
        Self {
            security,
            no_zeroes,
            structured: false,
            extended: false,
            contexts: None,
        }
    }

    /// What was agreed on with a client that uses `export` now.
    pub(super) fn agreed(&self, export: &Export) -> Agreed {
        let contexts = self.contexts.as_ref();
        Agreed {
            structured: self.structured,
            extended: self.extended,
            contexts: contexts
                .filter(|(name, _)| name == export.name())
                .map_or_else(Vec::new, |(_, contexts)| contexts.clone()),
        }
    }

    /// Answers an option. `exports` are in the order in which they came; the first is the default.
    pub(super) fn answer(
        &mut self,
        code: OptionCode,
        option: Result<ClientOption, DecodeError>,
        exports: &[Export],
        out: &mut Vec<u8>,
    ) -> Next {
        let mut say = |reply: OptionReply| reply.encode(code, out);
        if self.security == Security::Required
            && !matches!(code, OptionCode::StartTls | OptionCode::Abort)
        {
            if code == OptionCode::ExportName {
                return Next::Close;
            }
            say(OptionReply::error(
                OptionError::TlsRequired,
                "this server speaks over TLS only",
            ));
            return Next::Option;
        }
        let option = match option {
            Ok(option) => option,
            // There is no way to say no to it.
            Err(_) if code == OptionCode::ExportName => return Next::Close,
            Err(error) => {
                let kind = match error {
                    DecodeError::TooLong { .. } => OptionError::TooBig,
                    _ => OptionError::Invalid,
                };
                say(OptionReply::error(kind, error.to_string()));
                return Next::Option;
            }
        };
        match option {
            ClientOption::ExportName(name) => return self.old_way(&name, exports, out),
            ClientOption::Abort => {
                say(OptionReply::Ack);
                return Next::Close;
            }
            ClientOption::List => {
                for export in exports {
                    say(OptionReply::Server {
                        name: export.name().to_owned(),
                        details: export.description().to_owned(),
                    });
                }
                say(OptionReply::Ack);
            }
            ClientOption::StartTls => return self.start_tls(say),
            ClientOption::Info(query) => {
                self.tell(&query, exports, say);
            }
            ClientOption::Go(query) => {
                if let Some(export) = self.tell(&query, exports, say) {
                    return Next::Serve(Box::new(export.clone()));
                }
            }
            ClientOption::StructuredReply => {
                self.structured = true;
                say(OptionReply::Ack);
            }
            ClientOption::ExtendedHeaders => {
                (self.structured, self.extended) = (true, true);
                say(OptionReply::Ack);
            }
            ClientOption::ListMetaContext(query) => self.list_contexts(&query, exports, say),
            ClientOption::SetMetaContext(query) => self.choose_contexts(&query, exports, say),
            ClientOption::Unknown(_) => say(OptionReply::error(
                OptionError::Unsupported,
                "this server does not know the option",
            )),
        }
        Next::Option
    }

    fn old_way(&self, name: &str, exports: &[Export], out: &mut Vec<u8>) -> Next {
        let Some(export) = find(exports, name) else {
            return Next::Close;
        };
        let old = OldExport {
            size: export.storage().len(),
            flags: export.flags(self.structured),
        };
        out.extend_from_slice(&old.encode());
        if !self.no_zeroes {
            out.extend_from_slice(&[0; OldExport::ZEROES]);
        }
        Next::Serve(Box::new(export.clone()))
    }

    fn start_tls(&self, mut say: impl FnMut(OptionReply)) -> Next {
        match self.security {
            Security::Offered | Security::Required => {
                say(OptionReply::Ack);
                return Next::StartTls;
            }
            Security::Off => say(OptionReply::error(
                OptionError::Policy,
                "this server has no certificate",
            )),
            Security::Established => say(OptionReply::error(
                OptionError::Invalid,
                "TLS is spoken already",
            )),
        }
        Next::Option
    }

    /// Tells what an export is like, if there is one.
    fn tell<'a>(
        &self,
        query: &InfoQuery,
        exports: &'a [Export],
        mut say: impl FnMut(OptionReply),
    ) -> Option<&'a Export> {
        let Some(export) = find(exports, &query.name) else {
            say(unknown());
            return None;
        };
        say(OptionReply::Info(Info::Export(nbd::Export {
            size: export.storage().len(),
            flags: export.flags(self.structured),
        })));
        let wanted = |kind| query.kinds.contains(&kind);
        if wanted(InfoKind::Name) {
            say(OptionReply::Info(Info::Name(export.name().to_owned())));
        }
        if wanted(InfoKind::Description) && !export.description().is_empty() {
            let description = export.description().to_owned();
            say(OptionReply::Info(Info::Description(description)));
        }
        // Who does not ask may break sizes that are unusual, and is told no for each request then.
        if wanted(InfoKind::BlockSize) {
            say(OptionReply::Info(Info::BlockSize(export.block_sizes())));
        }
        say(OptionReply::Ack);
        Some(export)
    }

    fn list_contexts(
        &self,
        query: &MetaQuery,
        exports: &[Export],
        mut say: impl FnMut(OptionReply),
    ) {
        let Some(export) = self.of_contexts(&query.name, exports, &mut say) else {
            return;
        };
        let wanted = |context: &Context| {
            let name = context.name();
            let namespace = name.split_inclusive(':').next();
            query.queries.is_empty()
                || query
                    .queries
                    .iter()
                    .any(|query| query == name || Some(query.as_str()) == namespace)
        };
        for context in export.contexts().into_iter().filter(wanted) {
            say(OptionReply::MetaContext {
                // Only a choice gives it a meaning.
                id: 0,
                name: context.name().to_owned(),
            });
        }
        say(OptionReply::Ack);
    }

    fn choose_contexts(
        &mut self,
        query: &MetaQuery,
        exports: &[Export],
        mut say: impl FnMut(OptionReply),
    ) {
        // A choice replaces the one before, also when it fails.
        self.contexts = None;
        let Some(export) = self.of_contexts(&query.name, exports, &mut say) else {
            return;
        };
        let chosen: Vec<Context> = export
            .contexts()
            .into_iter()
            .filter(|context| query.queries.iter().any(|query| query == context.name()))
            .collect();
        for context in &chosen {
            say(OptionReply::MetaContext {
                id: context.id(),
                name: context.name().to_owned(),
            });
        }
        say(OptionReply::Ack);
        self.contexts = Some((export.name().to_owned(), chosen));
    }

    fn of_contexts<'a>(
        &self,
        name: &str,
        exports: &'a [Export],
        mut say: impl FnMut(OptionReply),
    ) -> Option<&'a Export> {
        if !self.structured {
            say(OptionReply::error(
                OptionError::Invalid,
                "meta contexts need structured replies",
            ));
            return None;
        }
        let export = find(exports, name);
        if export.is_none() {
            say(unknown());
        }
        export
    }
}

fn unknown() -> OptionReply {
    OptionReply::error(OptionError::Unknown, "there is no such export")
}

/// The export of a name; that without a name is the first one.
fn find<'a>(exports: &'a [Export], name: &str) -> Option<&'a Export> {
    let named = exports.iter().find(|export| export.name() == name);
    named.or_else(|| exports.first().filter(|_| name.is_empty()))
}

#[cfg(not(loom))]
#[cfg(test)]
mod tests {
    use super::*;
    use crate::chunk::Storage;
    use crate::nbd::{OptionReplyHeader, TransmissionFlags};
    use std::sync::Arc;

    fn exports() -> Vec<Export> {
        let storage: Arc<dyn Storage> = Arc::new(crate::backend::MemoryStorage::new(1 << 20));
        ["a", "b"]
            .map(|name| Export::new(name, Arc::clone(&storage)).unwrap())
            .to_vec()
    }

    fn ask(negotiation: &mut Negotiation, option: &ClientOption) -> (Vec<OptionReply>, Next) {
        let mut out = Vec::new();
        let next = negotiation.answer(option.code(), Ok(option.clone()), &exports(), &mut out);
        let mut replies = Vec::new();
        let mut rest = out.as_slice();
        while let Some((header, tail)) = rest.split_first_chunk() {
            let header = OptionReplyHeader::decode(header).unwrap();
            assert_eq!(header.code, option.code());
            let (data, tail) = tail.split_at(header.len as usize);
            replies.push(OptionReply::decode(header.kind, data).unwrap());
            rest = tail;
        }
        assert!(rest.is_empty());
        let last = replies.iter().filter(|reply| reply.is_last()).count();
        assert_eq!(last, 1, "{replies:?}");
        assert!(replies.last().unwrap().is_last());
        (replies, next)
    }

    fn refusal(replies: &[OptionReply]) -> OptionError {
        match replies {
            [OptionReply::Error { error, .. }] => *error,
            other => panic!("{other:?}"),
        }
    }

    fn go(name: &str) -> ClientOption {
        ClientOption::Go(InfoQuery {
            name: name.into(),
            kinds: Vec::new(),
        })
    }

    fn contexts(name: &str, queries: &[&str]) -> MetaQuery {
        MetaQuery {
            name: name.into(),
            queries: queries.iter().map(|&query| query.to_owned()).collect(),
        }
    }

    #[test]
    fn nothing_is_told_before_tls_where_it_is_required() {
        let mut negotiation = Negotiation::new(Security::Required, true);
        for option in [ClientOption::List, go("a"), ClientOption::StructuredReply] {
            let (replies, _) = ask(&mut negotiation, &option);
            assert_eq!(refusal(&replies), OptionError::TlsRequired);
        }
        let old = ClientOption::ExportName("a".into());
        let mut out = Vec::new();
        let next = negotiation.answer(old.code(), Ok(old), &exports(), &mut out);
        assert!(matches!(next, Next::Close) && out.is_empty());
        let (_, next) = ask(&mut negotiation, &ClientOption::StartTls);
        assert!(matches!(next, Next::StartTls));
        let mut negotiation = Negotiation::new(Security::Established, true);
        let (replies, _) = ask(&mut negotiation, &ClientOption::StartTls);
        assert_eq!(refusal(&replies), OptionError::Invalid);
        let mut negotiation = Negotiation::new(Security::Off, true);
        let (replies, _) = ask(&mut negotiation, &ClientOption::StartTls);
        assert_eq!(refusal(&replies), OptionError::Policy);
    }

    #[test]
    fn the_export_without_a_name_is_the_first() {
        let mut negotiation = Negotiation::new(Security::Off, true);
        for (asked, given) in [("", "a"), ("b", "b")] {
            let (_, next) = ask(&mut negotiation, &go(asked));
            assert!(matches!(next, Next::Serve(export) if export.name() == given));
        }
        let (replies, next) = ask(&mut negotiation, &go("c"));
        assert_eq!(refusal(&replies), OptionError::Unknown);
        assert!(matches!(next, Next::Option));
    }

    #[test]
    fn only_who_takes_structured_replies_may_forbid_their_splitting() {
        let mut negotiation = Negotiation::new(Security::Off, true);
        let may = |replies: &[OptionReply]| match &replies[0] {
            OptionReply::Info(Info::Export(export)) => {
                export.flags.contains(TransmissionFlags::SEND_DF)
            }
            other => panic!("{other:?}"),
        };
        assert!(!may(&ask(&mut negotiation, &go("a")).0));
        ask(&mut negotiation, &ClientOption::StructuredReply);
        assert!(may(&ask(&mut negotiation, &go("a")).0));
    }

    #[test]
    fn contexts_are_chosen_for_one_export_and_need_structured_replies() {
        let mut negotiation = Negotiation::new(Security::Off, true);
        let choice = || ClientOption::SetMetaContext(contexts("a", &[nbd::ALLOCATION, "x:y"]));
        let (replies, _) = ask(&mut negotiation, &choice());
        assert_eq!(refusal(&replies), OptionError::Invalid);
        ask(&mut negotiation, &ClientOption::StructuredReply);
        let (replies, _) = ask(&mut negotiation, &choice());
        assert_eq!(replies.len(), 2);
        let [a, b] = exports().try_into().unwrap();
        assert_eq!(negotiation.agreed(&a).contexts, [Context::Allocation]);
        assert_eq!(negotiation.agreed(&b).contexts, []);
        // Whole namespaces can be listed, and not chosen.
        let base = contexts("a", &["base:"]);
        let (replies, _) = ask(
            &mut negotiation,
            &ClientOption::ListMetaContext(base.clone()),
        );
        assert_eq!(replies.len(), 2);
        let (replies, _) = ask(&mut negotiation, &ClientOption::SetMetaContext(base));
        assert_eq!(replies, [OptionReply::Ack]);
        assert_eq!(negotiation.agreed(&a).contexts, []);
    }

    #[test]
    fn what_cannot_be_read_is_refused_and_the_handshake_goes_on() {
        let mut negotiation = Negotiation::new(Security::Off, true);
        let mut out = Vec::new();
        let code = OptionCode::Go;
        let next = negotiation.answer(code, ClientOption::decode(code, b"x"), &exports(), &mut out);
        assert!(matches!(next, Next::Option));
        let header = OptionReplyHeader::decode(out.first_chunk().unwrap()).unwrap();
        let reply = OptionReply::decode(header.kind, &out[20..]).unwrap();
        assert_eq!(refusal(&[reply]), OptionError::Invalid);
    }
}
