//! A state machine and the threads that wait for it.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use migrate_proto::{Leecher, Message, Seeder};

/// A half of a session, as far as the threads around it need to know it.
pub(super) trait Machine: Send {
    type Event: Send;
    fn poll_message(&mut self) -> Option<Message>;
    fn poll_event(&mut self) -> Option<Self::Event>;
    fn has_event(&self) -> bool;
}

impl Machine for Seeder {
    type Event = migrate_proto::seeder::Event;

    fn poll_message(&mut self) -> Option<Message> {
        self.poll_message()
    }

    fn poll_event(&mut self) -> Option<Self::Event> {
        self.poll_event()
    }

    fn has_event(&self) -> bool {
        self.has_event()
    }
}

impl Machine for Leecher {
    type Event = migrate_proto::leecher::Event;

    fn poll_message(&mut self) -> Option<Message> {
        self.poll_message()
    }

    fn poll_event(&mut self) -> Option<Self::Event> {
        self.poll_event()
    }

    fn has_event(&self) -> bool {
        self.has_event()
    }
}

/// The machine behind a lock, and what to wait on: messages to send, events to deal with, work on the lanes.
#[derive(Debug)]
pub(super) struct Monitor<M> {
    state: Mutex<State<M>>,
    messages: Condvar,
    events: Condvar,
    work: Condvar,
}

#[derive(Debug)]
pub(super) struct State<M> {
    pub(super) machine: M,
    /// How often the machine was told something.
    told: u64,
    /// The session is over: threads leave as soon as they notice.
    pub(super) closed: bool,
}

impl<M: Machine> Monitor<M> {
    pub(super) fn new(machine: M) -> Self {
        Self {
            state: Mutex::new(State {
                machine,
                told: 0,
                closed: false,
            }),
            messages: Condvar::new(),
            events: Condvar::new(),
            work: Condvar::new(),
        }
    }

    /// A thread that panicked did so between two decisions at worst, and the session ends with it.
    pub(super) fn lock(&self) -> MutexGuard<'_, State<M>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets the machine decide something and wakes who waits for the outcome.
    pub(super) fn tell<R>(&self, tell: impl FnOnce(&mut M) -> R) -> R {
        let mut state = self.lock();
        let result = tell(&mut state.machine);
        let event = state.machine.has_event();
        state.told += 1;
        drop(state);
        if event {
            self.events.notify_all();
        }
        self.messages.notify_one();
        self.work.notify_all();
        result
    }

    /// Sends the machine's messages with `send` until the session is over and all are sent, or `send` fails.
    ///
    /// A message is taken only while `writer` is locked, so that whoever sends something of its own in between keeps
    /// the order: what the machine said before goes out before.
    pub(super) fn send_messages<W, E>(
        &self,
        writer: &Mutex<W>,
        mut send: impl FnMut(&mut W, &Message) -> Result<(), E>,
    ) -> Result<(), E> {
        loop {
            let (told, closed) = {
                let state = self.lock();
                (state.told, state.closed)
            };
            self.flush(writer, &mut send)?;
            if closed {
                return Ok(());
            }
            let state = self.lock();
            drop(
                self.messages
                    .wait_while(state, |state| state.told == told && !state.closed)
                    .unwrap_or_else(PoisonError::into_inner),
            );
        }
    }

    /// Sends what the machine has to say right now.
    pub(super) fn flush<W, E>(
        &self,
        writer: &Mutex<W>,
        send: &mut impl FnMut(&mut W, &Message) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut writer = writer.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let message = self.lock().machine.poll_message();
            match message {
                Some(message) => send(&mut writer, &message)?,
                None => return Ok(()),
            }
        }
    }

    /// The next event, if one comes within `patience`. Asking means that the last one was dealt with, and that may be
    /// what lanes wait for.
    pub(super) fn next_event(&self, patience: Duration) -> Option<M::Event> {
        let mut state = self.lock();
        if let Some(event) = state.machine.poll_event() {
            return Some(event);
        }
        state.told += 1;
        self.messages.notify_one();
        self.work.notify_all();
        let (mut state, _) = self
            .events
            .wait_timeout_while(state, patience, |state| !state.machine.has_event())
            .unwrap_or_else(PoisonError::into_inner);
        state.machine.poll_event()
    }

    /// Waits until something was decided, or for `patience`.
    pub(super) fn wait_for_work<'a>(
        &'a self,
        state: MutexGuard<'a, State<M>>,
        patience: Duration,
    ) -> MutexGuard<'a, State<M>> {
        self.work
            .wait_timeout(state, patience)
            .unwrap_or_else(PoisonError::into_inner)
            .0
    }

    /// Something else than [`tell`](Self::tell) has led to an event.
    pub(super) fn wake_driver(&self) {
        self.events.notify_all();
    }

    /// The session is over.
    pub(super) fn close(&self) {
        self.lock().closed = true;
        self.messages.notify_all();
        self.events.notify_all();
        self.work.notify_all();
    }
}
