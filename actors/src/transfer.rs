//! The transfer actor: owns a device's copy lanes, so that large copies between host and device never hold up its compute lane.
//!
//! It decides nothing: launches come from the device actor with everything settled, and go back when their lane is done.
//! Sends that may block: none upwards (the lane for landed launches holds more than can be out).

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Instant;

use crate::mailbox::{TransferMailbox, TransferWake};
use crate::memory::{DeviceLost, Lane, LaneKind, Launch};
use crate::supervisor::{ActorName, Exit, Supervisor, panic_message};

pub(crate) struct TransferActor<L> {
    shard: u16,
    upload: L,
    download: L,
    mailbox: TransferMailbox,
    in_flight: usize,
    done: Vec<Launch>,
}

impl<L: Lane> TransferActor<L> {
    /// Runs it on a thread of its own.
    pub(crate) fn spawn(
        shard: u16,
        upload: L,
        download: L,
        mailbox: TransferMailbox,
        supervisor: Arc<Supervisor>,
    ) -> std::io::Result<()> {
        let name = ActorName::Transfer(shard);
        let mut actor = TransferActor { shard, upload, download, mailbox, in_flight: 0, done: Vec::new() };
        supervisor.started(name);
        let reporter = supervisor.clone();
        let spawned = std::thread::Builder::new().name(name.to_string()).spawn(move || {
            let exit = match catch_unwind(AssertUnwindSafe(|| actor.run())) {
                Ok(Ok(())) => Exit::Finished,
                Ok(Err(lost)) => Exit::DeviceLost(lost.0.to_string()),
                Err(panic) => Exit::Panicked(panic_message(panic)),
            };
            // As the device actor does: what is done with the device lets go of it before it says so.
            let lost = (exit != Exit::Finished).then_some(actor);
            reporter.ended(name, exit);
            drop(lost);
        });
        spawned.map(drop).inspect_err(|error| supervisor.ended(name, Exit::Panicked(error.to_string())))
    }

    fn run(&mut self) -> Result<(), DeviceLost> {
        self.upload.on_progress(self.mailbox.doorbell());
        self.download.on_progress(self.mailbox.doorbell());
        tracing::debug!(target: "kv_cache::transfer", shard = self.shard, "running");
        let mut closed = false;
        while !(closed && self.in_flight == 0) {
            match self.wait()? {
                TransferWake::Launch(lane, launch) => {
                    self.in_flight += 1;
                    match lane {
                        LaneKind::Download => self.download.launch(launch),
                        LaneKind::Upload | LaneKind::Compute => self.upload.launch(launch),
                    }
                }
                TransferWake::Doorbell => {}
                TransferWake::Closed => closed = true,
            }
            self.upload.poll(&mut self.done)?;
            self.download.poll(&mut self.done)?;
            for launch in self.done.drain(..) {
                self.in_flight -= 1;
                if !self.mailbox.landed(launch) {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// Waits for the next message, or for a lane to come forward: as the device actor does, with as much patience as lanes ask for.
    fn wait(&mut self) -> Result<TransferWake, DeviceLost> {
        let (started, spin) = (Instant::now(), self.upload.spin());
        while !spin.is_zero() && started.elapsed() < spin {
            self.upload.poll(&mut self.done)?;
            self.download.poll(&mut self.done)?;
            if !self.done.is_empty() {
                return Ok(TransferWake::Doorbell);
            }
            if let Some(wake) = self.mailbox.try_next() {
                return Ok(wake);
            }
            std::hint::spin_loop();
        }
        for lane in [&mut self.upload, &mut self.download] {
            if !lane.is_idle() {
                lane.ring_when_done();
            }
        }
        Ok(self.mailbox.next())
    }
}
