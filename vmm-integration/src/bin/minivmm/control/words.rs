//! What is said over the control socket: a request is a line of JSON, an answer is some lines of news and one that ends it.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::args::Plan;

/// What a machine is asked.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) enum Request {
    /// What it does.
    Status,
    /// To stop the guest.
    Pause {
        /// How long that may take.
        #[serde(default = "soon")]
        deadline: u64,
    },
    /// To let it run.
    Resume,
    /// To wait for a guest.
    Receive {
        /// Where.
        listen: SocketAddr,
        /// Whether all of it has to be here before it runs.
        #[serde(default)]
        without_post_copy: bool,
    },
    /// To send its guest.
    Migrate {
        /// Where to.
        pairing: String,
        /// How.
        #[serde(default)]
        plan: Plan,
    },
    /// To give up a migration.
    Cancel,
    /// To type on the console.
    Type {
        /// What.
        text: String,
    },
    /// To end.
    Quit,
}

fn soon() -> u64 {
    5000
}

/// A line of an answer.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Answer {
    /// Something happened; more lines follow.
    News(Value),
    /// It was done. The last line.
    Done(Value),
    /// It was not done. The last line.
    Failed(String),
}
