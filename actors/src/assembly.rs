//! Puts a cache's actors together: mailboxes, threads, and what the handles need to reach them.

use std::sync::{Arc, mpsc};
use std::time::Instant;

use crate::device::{self, CoreConfig, DeviceParts, ShardView};
use crate::directory::Directory;
use crate::events::EventHub;
use crate::mailbox;
use crate::memory::Backend;
use crate::router::{self, FaultInjector, RouterActor, RouterHandle, RouterInbox, Shard};
use crate::sequence::CloseHook;
use crate::supervisor::{ActorName, Exit, Supervisor};
use crate::transfer::TransferActor;
use crate::usher::UsherHandle;

/// A cache whose shards are being opened.
pub struct Assembler {
    supervisor: Arc<Supervisor>,
    directory: Arc<Directory>,
    router: RouterHandle,
    inbox: RouterInbox,
    usher: UsherHandle,
    on_drop: CloseHook,
    shards: Vec<Shard>,
    lane_capacity: usize,
    events: EventHub,
    opened_at: Instant,
}

/// A cache whose shards are open. The router runs as soon as its task is spawned.
pub struct Assembly {
    /// To the router.
    pub router: RouterHandle,
    /// Open sequences.
    pub directory: Arc<Directory>,
    /// How the actors are.
    pub supervisor: Arc<Supervisor>,
    /// What each shard shows.
    pub views: Vec<ShardView>,
    /// Injects faults.
    pub faults: FaultInjector,
}

impl Assembler {
    /// A cache of `shards` shards in which at most `in_flight_max` operations and `sequences_max` sequences can be.
    pub fn new(shards: usize, in_flight_max: usize, sequences_max: usize, events: EventHub) -> Self {
        let (router, usher, on_drop, inbox) = router::inbox();
        Assembler {
            supervisor: Supervisor::new(shards),
            directory: Arc::default(),
            router,
            inbox,
            usher,
            on_drop,
            shards: Vec::new(),
            lane_capacity: in_flight_max + sequences_max,
            events,
            opened_at: Instant::now(),
        }
    }

    /// Opens a device and starts its actors. Blocks while the slab is allocated.
    ///
    /// # Errors
    /// Why the device or a thread could not be had, in words for a person.
    pub fn add_shard<B: Backend>(&mut self, backend: B, config: CoreConfig) -> Result<(), String> {
        let shard = config.shard;
        let (sender, device_mailbox, transfer, transfer_mailbox) = mailbox::shard(self.lane_capacity);
        let (supervisor, directory, on_drop) =
            (self.supervisor.clone(), self.directory.clone(), self.on_drop.clone());
        let (usher, events, opened_at) = (self.usher.clone(), self.events.clone(), self.opened_at);
        let (ready_tx, ready) = mpsc::channel::<Result<ShardView, String>>();
        let name = ActorName::Device(shard);
        self.supervisor.started(name);
        let spawned = std::thread::Builder::new().name(name.to_string()).spawn(move || {
            let opened = backend.open(&config.layout, &config.pool, &config.formats).and_then(|lanes| {
                TransferActor::spawn(
                    shard,
                    lanes.upload,
                    lanes.download,
                    transfer_mailbox,
                    supervisor.clone(),
                )
                .map_err(|error| format!("no thread for the transfer actor: {error}"))?;
                Ok(lanes.compute)
            });
            match opened {
                Ok(compute) => {
                    let mailbox = device_mailbox;
                    let parts = DeviceParts {
                        config,
                        compute,
                        mailbox,
                        transfer,
                        directory,
                        supervisor,
                        on_drop,
                        usher,
                        events,
                        opened_at,
                    };
                    device::run(parts, |view| drop(ready_tx.send(Ok(view))));
                }
                Err(error) => {
                    supervisor.ended(name, Exit::DeviceLost(error.clone()));
                    drop(ready_tx.send(Err(error)));
                }
            }
        });
        if let Err(error) = spawned {
            let error = format!("no thread for the device actor: {error}");
            self.supervisor.ended(name, Exit::DeviceLost(error.clone()));
            return Err(error);
        }
        let view = ready
            .recv()
            .unwrap_or_else(|_| Err("the device actor ended while it opened its device".into()))?;
        self.shards.push(Shard { sender, view });
        Ok(())
    }

    /// Everything the handles need, and the router's task, to be spawned by the caller.
    pub fn finish(self, deterministic: bool) -> (Assembly, impl Future<Output = ()> + Send + 'static) {
        let assembly = Assembly {
            router: self.router,
            directory: self.directory,
            supervisor: self.supervisor.clone(),
            views: self.shards.iter().map(|shard| shard.view.clone()).collect(),
            faults: FaultInjector(self.shards.iter().map(|shard| shard.sender.control.clone()).collect()),
        };
        self.supervisor.started(ActorName::Router);
        let router = RouterActor::new(self.shards, deterministic, self.supervisor);
        (assembly, router.run(self.inbox))
    }
}
