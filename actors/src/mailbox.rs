//! Mailboxes of the actors that run on OS threads: bounded lanes, control before data.
//!
//! | lane | from | capacity, and why that much |
//! |---|---|---|
//! | control | supervisor | 8: one stop, a few injected faults |
//! | data | router, and callers past it | operations that permits allow in flight, plus one close per sequence: a send cannot find it full |
//! | launches | device actor | [`TRANSFERS_MAX`]: it keeps the rest to itself |
//! | landed | transfer actor | [`TRANSFERS_MAX`]: no more launches than that are out, so a send cannot block |
//! | doorbell | the device's own threads | 1: rung is rung |

use std::sync::atomic::fence;

use crossbeam_channel::{Receiver, Sender, TryRecvError, bounded, never, select_biased};

use crate::memory::{DeviceLost, Doorbell, LaneKind, Launch};
use crate::submission::Submissions;
use crate::sync::{Arc, Ordering};

/// Launches that may be with a transfer actor at once; more wait with the device actor.
pub(crate) const TRANSFERS_MAX: usize = 64;

/// What overtakes data.
#[derive(Debug)]
pub(crate) enum Control {
    /// Panic, to prove what a panic does.
    #[cfg(any(test, feature = "testing"))]
    Panic,
    /// Treat the device as lost for this reason.
    Lost(DeviceLost),
}

/// What the device actor wakes for.
#[derive(Debug)]
pub(crate) enum Wake {
    Control(Control),
    /// A copy lane is done with a launch.
    Landed(Launch),
    /// The transfer actor has ended, with this reason if its device was lost.
    TransferEnded,
    /// A lane has made progress.
    Doorbell,
    Submissions(Submissions),
    /// Nobody can send submissions any more.
    Closed,
}

/// The receiving side of a device actor.
pub(crate) struct DeviceMailbox {
    control: Receiver<Control>,
    data: Receiver<Submissions>,
    landed: Receiver<Launch>,
    doorbell: Receiver<()>,
    ring: Sender<()>,
}

/// The sending side of a device actor's data and control.
#[derive(Debug, Clone)]
pub(crate) struct DeviceSender {
    pub(crate) control: Sender<Control>,
    pub(crate) data: Sender<Submissions>,
    /// The other end of `data`. A bounded channel keeps what it holds when its receiver goes, and with it the callers who
    /// wait: whoever sends to an actor that has ended takes it back from here.
    pub(crate) unreceived: Receiver<Submissions>,
}

/// The sending side of the transfer actor.
pub(crate) struct TransferSender(Sender<(LaneKind, Launch)>);

/// The receiving side of the transfer actor, and where it sends what has landed.
pub(crate) struct TransferMailbox {
    launches: Receiver<(LaneKind, Launch)>,
    landed: Sender<Launch>,
    doorbell: Receiver<()>,
    ring: Sender<()>,
}

/// Mailboxes of one shard. `data_capacity` is the most submissions that can be under way.
pub(crate) fn shard(data_capacity: usize) -> (DeviceSender, DeviceMailbox, TransferSender, TransferMailbox) {
    let (control_tx, control) = bounded(8);
    let (data_tx, data) = bounded(data_capacity);
    let (landed_tx, landed) = bounded(TRANSFERS_MAX);
    let (launch_tx, launches) = bounded(TRANSFERS_MAX);
    let (ring, doorbell) = bounded(1);
    let (transfer_ring, transfer_doorbell) = bounded(1);
    (
        DeviceSender { control: control_tx, data: data_tx, unreceived: data.clone() },
        DeviceMailbox { control, data, landed, doorbell, ring },
        TransferSender(launch_tx),
        TransferMailbox { launches, landed: landed_tx, doorbell: transfer_doorbell, ring: transfer_ring },
    )
}

fn doorbell(ring: &Sender<()>) -> Doorbell {
    let ring = ring.clone();
    Arc::new(move || {
        // Full means that it rings already.
        let _ = ring.try_send(());
    })
}

impl DeviceMailbox {
    /// Wakes this actor.
    pub(crate) fn doorbell(&self) -> Doorbell {
        doorbell(&self.ring)
    }

    /// Drops what nobody will receive any more. The end must have been recorded before: see [`DeviceSender::unreceived`].
    pub(crate) fn discard(&self) {
        fence(Ordering::SeqCst);
        while self.data.try_recv().is_ok() {}
    }

    pub(crate) fn depth(&self) -> usize {
        self.data.len()
    }

    /// The next message if there is one.
    pub(crate) fn try_next(&mut self) -> Option<Wake> {
        if let Ok(control) = self.control.try_recv() {
            return Some(Wake::Control(control));
        }
        match self.landed.try_recv() {
            Ok(launch) => return Some(Wake::Landed(launch)),
            Err(TryRecvError::Disconnected) => return Some(self.transfer_ended()),
            Err(TryRecvError::Empty) => {}
        }
        if self.doorbell.try_recv().is_ok() {
            return Some(Wake::Doorbell);
        }
        match self.data.try_recv() {
            Ok(submissions) => Some(Wake::Submissions(submissions)),
            Err(TryRecvError::Disconnected) => Some(self.closed()),
            Err(TryRecvError::Empty) => None,
        }
    }

    /// More submissions if there are any, without a look at the other lanes.
    pub(crate) fn try_next_submissions(&mut self) -> Option<Submissions> {
        self.data.try_recv().ok()
    }

    /// Waits for the next message.
    pub(crate) fn next(&mut self) -> Wake {
        select_biased! {
            recv(self.control) -> control => match control {
                Ok(control) => Wake::Control(control),
                Err(_) => {
                    self.control = never();
                    Wake::Doorbell
                }
            },
            recv(self.landed) -> launch => launch.map_or_else(|_| self.transfer_ended(), Wake::Landed),
            recv(self.doorbell) -> _ => Wake::Doorbell,
            recv(self.data) -> submissions => submissions.map_or_else(|_| self.closed(), Wake::Submissions),
        }
    }

    // A disconnected lane is reported once and never looked at again.
    fn closed(&mut self) -> Wake {
        self.data = never();
        Wake::Closed
    }

    fn transfer_ended(&mut self) -> Wake {
        self.landed = never();
        Wake::TransferEnded
    }
}

impl TransferSender {
    /// Sends a launch to the transfer actor. Never more than [`TRANSFERS_MAX`] are out, so it does not block.
    pub(crate) fn send(&self, lane: LaneKind, launch: Launch) -> Result<(), DeviceLost> {
        self.0.send((lane, launch)).map_err(|_| DeviceLost("its transfer actor ended".into()))
    }
}

/// What the transfer actor wakes for.
pub(crate) enum TransferWake {
    Launch(LaneKind, Launch),
    Doorbell,
    Closed,
}

impl TransferMailbox {
    pub(crate) fn doorbell(&self) -> Doorbell {
        doorbell(&self.ring)
    }

    /// Waits for the next message.
    pub(crate) fn next(&mut self) -> TransferWake {
        select_biased! {
            recv(self.doorbell) -> _ => TransferWake::Doorbell,
            recv(self.launches) -> launch => match launch {
                Ok((lane, launch)) => TransferWake::Launch(lane, launch),
                Err(_) => self.closed(),
            },
        }
    }

    /// The next message if there is one.
    pub(crate) fn try_next(&mut self) -> Option<TransferWake> {
        if self.doorbell.try_recv().is_ok() {
            return Some(TransferWake::Doorbell);
        }
        match self.launches.try_recv() {
            Ok((lane, launch)) => Some(TransferWake::Launch(lane, launch)),
            Err(TryRecvError::Disconnected) => Some(self.closed()),
            Err(TryRecvError::Empty) => None,
        }
    }

    fn closed(&mut self) -> TransferWake {
        self.launches = never();
        TransferWake::Closed
    }

    /// Reports a launch that has landed. False if the device actor is gone.
    pub(crate) fn landed(&self, launch: Launch) -> bool {
        self.landed.send(launch).is_ok()
    }
}
