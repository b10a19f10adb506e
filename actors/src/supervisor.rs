//! One supervisor per cache: how every actor ended, which shards are lost, and who waits for the end.
//!
//! An actor that panics takes its shard with it, not the process: whatever the panic left half done is unreachable, since
//! the shard's sequences fail with the reason and no other shard shares memory with it.

use std::any::Any;
use std::future::poll_fn;
use std::sync::{Arc, OnceLock};
use std::task::{Poll, Waker};

use serde::Serialize;

use crate::error::Error;
use crate::sync::{Mutex, lock};

/// Which actor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ActorName {
    /// The router.
    Router,
    /// The device actor of a shard.
    Device(u16),
    /// The transfer actor of a shard.
    Transfer(u16),
}

impl std::fmt::Display for ActorName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            ActorName::Router => f.write_str("kv-router"),
            ActorName::Device(shard) => write!(f, "kv-device-{shard}"),
            ActorName::Transfer(shard) => write!(f, "kv-transfer-{shard}"),
        }
    }
}

/// How an actor ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Exit {
    /// It was told to stop, or nobody could send it anything any more, and it had finished its work.
    Finished,
    /// It panicked with this message.
    Panicked(String),
    /// Its device is lost, for this reason.
    DeviceLost(String),
}

/// The record of a cache's actors.
#[derive(Debug)]
pub struct Supervisor {
    lost: Vec<OnceLock<Arc<str>>>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    running: Vec<ActorName>,
    exits: Vec<(ActorName, Exit)>,
    waiting: Vec<Waker>,
}

impl Supervisor {
    /// A supervisor over `shards` shards.
    pub fn new(shards: usize) -> Arc<Self> {
        let lost = (0..shards).map(|_| OnceLock::new()).collect();
        Arc::new(Supervisor { lost, state: Mutex::new(State::default()) })
    }

    /// Records that an actor runs.
    pub fn started(&self, name: ActorName) {
        lock(&self.state).running.push(name);
    }

    /// Records how an actor ended, and marks its shard lost if that was not in peace.
    ///
    /// Call it before the actor's state is dropped: whoever finds a reply dropped finds the reason here.
    pub fn ended(&self, name: ActorName, exit: Exit) {
        let reason = match &exit {
            Exit::Finished => None,
            Exit::Panicked(message) => Some(format!("{name} panicked: {message}")),
            Exit::DeviceLost(reason) => Some(reason.clone()),
        };
        match &reason {
            None => tracing::debug!(target: "kv_cache::supervisor", actor = %name, "finished"),
            Some(reason) => tracing::error!(target: "kv_cache::supervisor", actor = %name, reason, "ended"),
        }
        if let (Some(reason), ActorName::Device(shard) | ActorName::Transfer(shard)) = (reason, name) {
            self.mark_lost(shard, &reason);
        }
        let waiting = {
            let mut state = lock(&self.state);
            state.running.retain(|running| *running != name);
            state.exits.push((name, exit));
            std::mem::take(&mut state.waiting)
        };
        waiting.into_iter().for_each(Waker::wake);
    }

    /// Marks a shard lost; the first reason stays.
    pub fn mark_lost(&self, shard: u16, reason: &str) {
        if let Some(lost) = self.lost.get(shard as usize) {
            let _ = lost.set(reason.into());
        }
    }

    /// The error of a shard that is lost.
    pub fn lost(&self, shard: u16) -> Option<Error> {
        let reason = self.lost.get(shard as usize)?.get()?.clone();
        Some(Error::ShardLost { shard, reason })
    }

    /// The error of the first shard that is lost, if one is.
    pub fn any_lost(&self) -> Option<Error> {
        (0..self.lost.len() as u16).find_map(|shard| self.lost(shard))
    }

    /// Actors that have ended, and how.
    pub fn exits(&self) -> Vec<(ActorName, Exit)> {
        lock(&self.state).exits.clone()
    }

    /// Actors that run.
    pub fn running(&self) -> Vec<ActorName> {
        lock(&self.state).running.clone()
    }

    /// Waits until every actor has ended.
    pub async fn all_ended(&self) {
        poll_fn(|context| {
            let mut state = lock(&self.state);
            if state.running.is_empty() {
                return Poll::Ready(());
            }
            state.waiting.push(context.waker().clone());
            Poll::Pending
        })
        .await;
    }
}

/// The message of a caught panic.
pub(crate) fn panic_message(payload: Box<dyn Any + Send>) -> String {
    match payload.downcast::<String>() {
        Ok(message) => *message,
        Err(payload) => payload.downcast_ref::<&str>().map_or_else(|| "no message".into(), |s| (*s).into()),
    }
}
