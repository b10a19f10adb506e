//! What goes from the runner's thread to one client, through a channel that never makes the runner wait.
//!
//! The channel is bounded, so a client that reads slowly fills it. Then the runner parks the request (its sequence is closed, it costs no
//! compute and no cache), and the reader's side says when there is room again. Nobody polls, and no message is lost on the way: whichever
//! side comes second sees the flag.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc as mailbox;
use std::time::Instant;

use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;

use crate::api::{FinishReason, Usage};
use crate::error::ApiError;
use crate::runner::Mail;
use crate::scheduler::RequestId;

/// Pieces of text on their way to a client. A piece is a token or so: enough to ride out the pauses of a healthy connection.
const EVENTS_MAX: usize = 64;

/// One thing that happens to an answer. The last two end it.
#[derive(Debug)]
pub(crate) enum Event {
    Text(String),
    Done(FinishReason, Usage),
    Failed(ApiError),
}

/// The runner's end.
#[derive(Debug)]
pub(crate) struct Outbox {
    sender: mpsc::Sender<Event>,
    /// What did not fit: the piece at which it was found to be full, and an end behind it.
    backlog: VecDeque<Event>,
    behind: Arc<AtomicBool>,
    behind_since: Option<Instant>,
}

/// The client's end. Dropping it says that the client is gone.
#[derive(Debug)]
pub(crate) struct Inbox {
    id: RequestId,
    receiver: mpsc::Receiver<Event>,
    behind: Arc<AtomicBool>,
    runner: mailbox::Sender<Mail>,
}

/// Both ends for one request.
pub(crate) fn channel(id: RequestId, runner: mailbox::Sender<Mail>) -> (Outbox, Inbox) {
    let (sender, receiver) = mpsc::channel(EVENTS_MAX);
    let behind = Arc::new(AtomicBool::new(false));
    let outbox = Outbox { sender, backlog: VecDeque::new(), behind: behind.clone(), behind_since: None };
    (outbox, Inbox { id, receiver, behind, runner })
}

impl Outbox {
    /// Sends, or keeps what does not fit. Returns whether the client keeps up.
    pub(crate) fn push(&mut self, event: Event) -> bool {
        self.backlog.push_back(event);
        self.flush()
    }

    /// Sends what was kept, as far as it fits. Returns whether the client keeps up.
    pub(crate) fn flush(&mut self) -> bool {
        while let Some(event) = self.backlog.pop_front() {
            match self.sender.try_send(event) {
                Ok(()) => {}
                Err(TrySendError::Full(event)) => {
                    self.backlog.push_front(event);
                    // The reader may have emptied it before the flag was up; he who finds it up will say so.
                    if self.behind.swap(true, Ordering::SeqCst) {
                        self.behind_since.get_or_insert_with(Instant::now);
                        return false;
                    }
                }
                // The inbox has said so itself.
                Err(TrySendError::Closed(_)) => self.backlog.clear(),
            }
        }
        self.behind_since = None;
        true
    }

    /// Since when the client has been behind.
    pub(crate) fn behind_since(&self) -> Option<Instant> {
        self.behind_since
    }
}

impl Inbox {
    /// The next event; none after the end, or if the runner has given the request up. Cancel-safe.
    pub(crate) async fn next(&mut self) -> Option<Event> {
        std::future::poll_fn(|context| self.poll_next(context)).await
    }

    pub(crate) fn poll_next(
        &mut self,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Event>> {
        let event = self.receiver.poll_recv(context);
        if event.is_ready()
            && self.receiver.len() <= EVENTS_MAX / 2
            && self.behind.swap(false, Ordering::SeqCst)
        {
            // The runner has ended: the channel will say so, too.
            let _ = self.runner.send(Mail::CaughtUp(self.id));
        }
        event
    }
}

impl Drop for Inbox {
    fn drop(&mut self) {
        let _ = self.runner.send(Mail::Gone(self.id));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(event: Option<Event>) -> String {
        match event {
            Some(Event::Text(text)) => text,
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn a_slow_reader_is_noticed_and_says_when_he_has_caught_up() {
        let (mail, runner) = mailbox::channel();
        let (mut outbox, mut inbox) = channel(RequestId(3), mail);
        let sent: Vec<bool> = (0..=EVENTS_MAX).map(|at| outbox.push(Event::Text(at.to_string()))).collect();
        assert!(sent[..EVENTS_MAX].iter().all(|keeps_up| *keeps_up) && !sent[EVENTS_MAX]);
        assert!(outbox.behind_since().is_some());
        // The end is kept behind what does not fit.
        assert!(!outbox.push(Event::Done(FinishReason::Stop, Usage::default())));
        for at in 0..EVENTS_MAX / 2 {
            assert!(runner.try_recv().is_err(), "not yet at {at}");
            assert_eq!(text(inbox.next().await), at.to_string());
        }
        assert!(matches!(runner.try_recv(), Ok(Mail::CaughtUp(RequestId(3)))));
        assert!(outbox.flush() && outbox.behind_since().is_none());
        for at in EVENTS_MAX / 2..=EVENTS_MAX {
            assert_eq!(text(inbox.next().await), at.to_string());
        }
        assert!(matches!(inbox.next().await, Some(Event::Done(..))));
        assert!(runner.try_recv().is_err(), "said once");
    }

    #[tokio::test]
    async fn a_client_that_goes_says_so_once_and_takes_everything_with_it() {
        let (mail, runner) = mailbox::channel();
        let (mut outbox, inbox) = channel(RequestId(3), mail);
        drop(inbox);
        assert!(matches!(runner.try_recv(), Ok(Mail::Gone(RequestId(3)))));
        for _ in 0..2 * EVENTS_MAX {
            assert!(outbox.push(Event::Text("nobody".into())));
        }
    }

    /// Two threads, one as fast as it can and one that is told: whatever the order, the writer always hears that there is room.
    #[test]
    fn nothing_is_lost_between_two_threads() {
        const EVENTS: usize = 200_000;
        let (mail, runner) = mailbox::channel();
        let (mut outbox, mut inbox) = channel(RequestId(0), mail);
        let writer = std::thread::spawn(move || {
            for at in 0..EVENTS {
                let mut keeps_up = outbox.push(Event::Text(at.to_string()));
                while !keeps_up {
                    assert!(matches!(runner.recv(), Ok(Mail::CaughtUp(_))));
                    keeps_up = outbox.flush();
                }
            }
        });
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            for at in 0..EVENTS {
                assert_eq!(text(inbox.next().await), at.to_string());
            }
        });
        writer.join().unwrap();
    }
}
