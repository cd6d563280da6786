//! How the command ends: what it says, and its exit code.

use std::process::ExitCode;

use memferry::migrate::{LeechError, SeedError};
use serde_json::json;

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

/// Prints what went wrong, if something did.
pub(crate) fn report(result: anyhow::Result<()>, json: bool) -> ExitCode {
    let Err(error) = result else {
        return ExitCode::SUCCESS;
    };
    let code = code(&error);
    let message = message(&error);
    if json {
        println!(
            "{}",
            json!({ "event": "error", "exit": code, "message": message })
        );
    }
    eprintln!("memferry: {message}");
    ExitCode::from(code)
}

fn code(error: &anyhow::Error) -> u8 {
    match (
        error.downcast_ref::<SeedError>(),
        error.downcast_ref::<LeechError>(),
    ) {
        (Some(SeedError::Lost { .. } | SeedError::Unverified { .. }), _)
        | (
            _,
            Some(
                LeechError::Lost { .. }
                | LeechError::Undecided { .. }
                | LeechError::NotRunning { .. },
            ),
        ) => 3,
        _ if error.is::<Different>() => 4,
        _ => 1,
    }
}

/// The error and its causes, each once: some say their cause themselves.
fn message(error: &anyhow::Error) -> String {
    let mut message = error.to_string();
    for cause in error.chain().skip(1) {
        let cause = cause.to_string();
        if !message.contains(&cause) {
            message.push_str(": ");
            message.push_str(&cause);
        }
    }
    message
}
