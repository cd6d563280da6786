//! The control socket: who asks, and what is answered.

pub(crate) mod client;
mod words;

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use serde_json::{Value, json};

use crate::desk::Desk;
use words::{Answer, Request};

/// The longest line that is read. Requests are short.
const LONGEST: u64 = 64 << 10;

/// A control socket; removed when it is dropped.
#[derive(Debug)]
pub(crate) struct Socket(PathBuf);

impl Socket {
    /// Answers at `path`, on threads of its own. Whoever may open the socket may do everything: it is made for its user alone.
    pub(crate) fn open(path: &Path, desk: &Arc<Desk>) -> io::Result<Self> {
        // One that was left behind by a machine that is gone would refuse connections.
        if UnixStream::connect(path)
            .is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
        {
            fs::remove_file(path)?;
        }
        let listener = UnixListener::bind(path)?;
        let desk = Arc::clone(desk);
        thread::Builder::new()
            .name("control".into())
            .spawn(move || {
                for stream in listener.incoming().flatten() {
                    let desk = Arc::clone(&desk);
                    // One that cannot be answered is closed.
                    let _ = thread::Builder::new()
                        .name("control".into())
                        .spawn(move || serve(&stream, &desk));
                }
            })?;
        Ok(Self(path.to_owned()))
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        // It may have been removed by somebody else.
        let _ = fs::remove_file(&self.0);
    }
}

/// Answers until the other end closes.
fn serve(stream: &UnixStream, desk: &Desk) {
    let say = |answer: &Answer| -> io::Result<()> {
        let mut line = serde_json::to_vec(answer)?;
        line.push(b'\n');
        let mut stream = stream;
        stream.write_all(&line)
    };
    let mut lines = BufReader::new(stream);
    loop {
        let mut line = Vec::new();
        match (&mut lines).take(LONGEST).read_until(b'\n', &mut line) {
            Ok(1..) if line.ends_with(b"\n") => {}
            _ => return,
        }
        let answer = match serde_json::from_slice(&line) {
            // News that nobody takes any more are no reason to stop what was asked for.
            Ok(request) => answer(desk, request, &mut |news| drop(say(&Answer::News(news)))),
            Err(error) => Ok(Answer::Failed(format!("this is no request: {error}"))),
        };
        let answer = answer.unwrap_or_else(|error| Answer::Failed(format!("{error:#}")));
        if say(&answer).is_err() {
            return;
        }
    }
}

fn answer(desk: &Desk, request: Request, news: &mut dyn FnMut(Value)) -> Result<Answer> {
    let done = || Answer::Done(Value::Null);
    Ok(match request {
        Request::Status => Answer::Done(desk.status()),
        Request::Pause { deadline } => {
            desk.pause(Instant::now() + Duration::from_millis(deadline))?;
            done()
        }
        Request::Resume => {
            desk.resume()?;
            done()
        }
        Request::Receive {
            listen,
            without_post_copy,
        } => Answer::Done(desk.receive(listen, without_post_copy, news)?),
        Request::Migrate { pairing, plan } => Answer::Done(desk.migrate(&pairing, &plan, news)?),
        Request::Cancel => {
            desk.cancel()?;
            done()
        }
        Request::Type { text } => Answer::Done(json!(desk.type_in(text.as_bytes())?)),
        Request::Quit => {
            desk.quit();
            done()
        }
    })
}
