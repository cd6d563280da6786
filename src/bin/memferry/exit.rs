//! How the command ends: what it says, and its exit code.

use std::process::ExitCode;

use memferry::migrate::{LeechError, SeedError};
use memferry::subject::qemu::QemuError;
use serde_json::json;

use crate::mount::{Lost, Unsaved};
use crate::output::{say, warn};
use crate::uffd_handler::Deprived;

/// The two copies of the memory are not the same.
#[derive(Debug, thiserror::Error)]
#[error(
    "{different} of {compared} chunks differ between source and destination. The guest runs at the destination with memory that is \
     not what it was: stop it there; the guest at the source is as it was at hand-over"
)]
pub(crate) struct Different {
    /// Chunks that differ.
    pub(crate) different: u64,
    /// Chunks that were compared.
    pub(crate) compared: u64,
}

/// The destination QEMU has ended after hand-over.
#[derive(Debug, thiserror::Error)]
#[error(
    "the guest was handed over and all of its memory has come, but the QEMU here does not answer any more. If it has ended, the guest is \
     lost as it was here; the source stands still with the guest as it was at hand-over, and `cont` on the source QEMU's QMP socket \
     lets that run. Never both"
)]
pub(crate) struct Ended(#[source] pub(crate) QemuError);

/// What clients wrote could not be made durable.
#[derive(Debug, thiserror::Error)]
#[error(
    "what was written since clients last flushed may be lost: the storage could not make it durable. Clients that flushed know that \
     what they wrote before is there"
)]
pub(crate) struct Unflushed(#[source] pub(crate) std::io::Error);

/// A program that was run for the user has ended so.
#[derive(Debug, thiserror::Error)]
#[error("the program ended with code {0}")]
pub(crate) struct Exited(pub(crate) u8);

/// Prints what went wrong, if something did.
pub(crate) fn report(result: anyhow::Result<()>, json: bool) -> ExitCode {
    let Err(error) = result else {
        return ExitCode::SUCCESS;
    };
    // It has said itself what there was to say.
    if let Some(Exited(code)) = error.downcast_ref() {
        return ExitCode::from(*code);
    }
    let code = code(&error);
    let message = message(&error);
    if json {
        say(&json!({ "event": "error", "exit": code, "message": message }));
    }
    warn(&format_args!("memferry: {message}"));
    ExitCode::from(code)
}

/// 1 promises that the guest runs on at the source; 3 is for all that an operator has to settle.
fn code(error: &anyhow::Error) -> u8 {
    match (
        error.downcast_ref::<SeedError>(),
        error.downcast_ref::<LeechError>(),
    ) {
        (
            Some(SeedError::Lost { .. } | SeedError::Unverified { .. } | SeedError::Stuck { .. }),
            _,
        )
        | (
            _,
            Some(
                LeechError::Lost { .. }
                | LeechError::Undecided { .. }
                | LeechError::NotRunning { .. },
            ),
        ) => 3,
        _ if error.is::<Ended>() || error.is::<Unflushed>() => 3,
        _ if error.is::<Unsaved>() || error.is::<Lost>() => 3,
        _ if error.is::<Deprived>() => 3,
        _ if error.is::<Different>() => 4,
        _ => 1,
    }
}

/// What an operator can do with a QEMU that was left in such a state.
fn by_hand(error: &anyhow::Error) -> Option<&'static str> {
    match (error.downcast_ref(), error.downcast_ref()) {
        (Some(SeedError::Lost { .. }), _) => Some(
            "QEMU keeps the guest here stopped (`query-status` says postmigrate); `cont` on its QMP socket would let it run here as it \
             was at hand-over",
        ),
        (_, Some(LeechError::Lost { .. })) => Some(
            "what is missing is in the RAM file of the source QEMU. To give this copy up, end this QEMU first, and then let the source \
             run with `cont` on its QMP socket",
        ),
        (_, Some(LeechError::Undecided { .. } | LeechError::NotRunning { .. })) => {
            Some("`cont` on this QEMU's QMP socket lets the guest run here; never on both sides")
        }
        _ => None,
    }
}

/// The error and its causes, each once: some say their cause themselves. Then what can be done.
fn message(error: &anyhow::Error) -> String {
    let mut message = error.to_string();
    for cause in error.chain().skip(1) {
        let cause = cause.to_string();
        if !message.contains(&cause) {
            message.push_str(": ");
            message.push_str(&cause);
        }
    }
    if let Some(by_hand) = by_hand(error) {
        message.push_str(". By hand: ");
        message.push_str(by_hand);
    }
    message
}

#[cfg(test)]
mod tests {
    use super::*;
    use memferry::migrate::Cause;
    use memferry::subject::SubjectError;

    fn check(error: impl Into<anyhow::Error>, expected: u8) {
        assert_eq!(code(&error.into()), expected);
    }

    #[test]
    fn only_a_guest_that_runs_on_at_the_source_is_told_by_1() {
        let cause = || Cause::Subject(SubjectError::new("it is slow"));
        check(anyhow::anyhow!("no such socket"), 1);
        check(SeedError::Aborted { cause: cause() }, 1);
        let resume = SubjectError::new("it does not answer");
        check(
            SeedError::Stuck {
                cause: cause(),
                resume,
            },
            3,
        );
        let cause = Cause::Subject(SubjectError::new("it is gone"));
        check(LeechError::Undecided { cause }, 3);
    }

    #[test]
    fn copies_that_differ_are_told_by_4() {
        check(
            Different {
                different: 1,
                compared: 2,
            },
            4,
        );
    }
}
