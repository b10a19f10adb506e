//! Lanes of the CUDA device: each turns launches into kernels on a stream of its own, and never waits for them.
//!
//! A launch becomes one unit, or several if its payload or output does not fit into half of the ring: it is written into the
//! ring, at most one kernel of each kind is launched over it, and a fence ticket follows. When the ticket is reached, flags and
//! outputs are taken from the ring and its bytes are free again.

use std::any::Any;
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use kv_cache_actors::geometry::{BlockLayout, Plane};
use kv_cache_actors::memory::{AppendRow, DeviceLost, Doorbell, Lane, LaneKind, Launch, Step};
use kv_cache_actors::reach::Point;

use super::Slab;
use super::compound::{Scoring, Staging, expand};
use super::driver::{DriverError, Event, PinnedMemory, Stream};
use super::fence::{Fence, Waiter};
use super::kernels::{Kernels, NearDescriptors};
use super::ring::Ring;
use super::transfer::Carrier;
use super::unit::{Plan, ReadBack, Unit, split_large};

/// A small launch takes 10 to 30 µs, and a decode step comes back in less than 100; waking a thread takes 15 to 50.
const SPIN: Duration = Duration::from_micros(100);

/// A lane of a CUDA device.
pub(crate) struct CudaLane {
    kind: LaneKind,
    // First: dropped before what its work uses.
    stream: Stream,
    kernels: Arc<Kernels>,
    slab: Arc<Slab>,
    layout: BlockLayout,
    ring: Ring,
    fence: Fence,
    waiter: Waiter,
    /// Launches that are not done, in order.
    launches: VecDeque<Launch>,
    /// Scores that they are to bring, of each launch.
    scorings: VecDeque<Vec<Scoring>>,
    staging: Staging,
    near: NearDescriptors,
    /// The launch that is being enqueued, and the first of its steps that is not.
    enqueuing: usize,
    next_step: usize,
    /// Units on the stream, in order.
    units: VecDeque<Flying>,
    /// The last ticket for which the waiter was armed.
    armed: u64,
    failed: Option<DriverError>,
    spare_reads: Vec<Vec<ReadBack>>,
    /// Carries blocks to or from the host tier, if there is one and this lane does.
    carrier: Option<Carrier>,
}

/// A unit that is on the stream.
struct Flying {
    ticket: u64,
    /// Its flags in the ring: of the launch's flights, and of the rows in its steps.
    flags: Range<usize>,
    steps: Range<usize>,
    reads: Vec<ReadBack>,
    ends_launch: bool,
    /// The transfer that has to be done too before the launch is, counted from 1.
    transfer: u64,
    /// Recorded behind it when the next unit came.
    event: Option<Event>,
}

impl CudaLane {
    /// Opens a lane with `ring_bytes` of page-locked memory. `gathers`: it may be told to gather tokens.
    pub(super) fn open(
        kind: LaneKind,
        slab: Arc<Slab>,
        kernels: Arc<Kernels>,
        layout: BlockLayout,
        ring_bytes: usize,
        calibrate: bool,
        gathers: bool,
    ) -> Result<CudaLane, DriverError> {
        let carrier = Carrier::open(kind, &slab, &kernels, calibrate)?;
        let gpu = slab.gpu().clone();
        let stream = Stream::new(&gpu)?;
        let fence = Fence::new(&stream, &kernels)?;
        let ring = Ring::new(PinnedMemory::zeroed(&gpu, ring_bytes)?);
        let near = NearDescriptors::new(&gpu)?;
        let staging = if gathers { Staging::allocate(&gpu, &layout)? } else { Staging::default() };
        Ok(CudaLane {
            kind,
            stream,
            kernels,
            slab,
            layout,
            ring,
            fence,
            waiter: Waiter::new(&gpu),
            launches: VecDeque::new(),
            scorings: VecDeque::new(),
            staging,
            near,
            enqueuing: 0,
            next_step: 0,
            units: VecDeque::new(),
            armed: 0,
            failed: None,
            spare_reads: Vec::new(),
            carrier,
        })
    }

    /// Puts as much on the stream as the ring has room for.
    fn pump(&mut self) -> Result<(), DriverError> {
        while self.enqueuing < self.launches.len() {
            let launch = &self.launches[self.enqueuing];
            let sealed = self.kernels.sealed();
            let bytes_max = self.ring.unit_bytes_max();
            let is_after_reads = |step: &Step| self.staging.is_source_of(step);
            let plan = Plan::of(&self.layout, sealed, launch, self.next_step, bytes_max, is_after_reads);
            if plan.bytes() > self.ring.unit_bytes_max() {
                // It would wait for room for ever. Settings that lead here are refused; if one slips through, losing the device
                // beats a lane that stands still.
                let text = format!("{} bytes of {}", plan.bytes(), self.ring.unit_bytes_max());
                return Err(DriverError::Call { call: "planning a unit", name: "too large".into(), text });
            }
            let ends_launch = self.next_step + plan.steps == launch.steps.len();
            if !self.enqueue(&plan, ends_launch)? {
                return Ok(());
            }
            self.next_step += plan.steps;
            if ends_launch {
                self.enqueuing += 1;
                self.next_step = 0;
            }
        }
        Ok(())
    }

    /// Puts one unit on the stream; false if the ring has no room for it now.
    fn enqueue(&mut self, plan: &Plan, ends_launch: bool) -> Result<bool, DriverError> {
        let ticket = self.fence.next_ticket();
        let Some(range) = self.ring.take(plan.bytes(), ticket) else { return Ok(false) };
        // Whoever sleeps for the unit before must not sleep for this one too.
        if self.units.back().is_some_and(|unit| unit.event.is_none()) {
            let event = self.record()?;
            if let Some(before) = self.units.back_mut() {
                before.event = Some(event);
            }
        }
        let launch = &self.launches[self.enqueuing];
        if self.next_step == 0 {
            for event in launch.waits_for().filter_map(|point| (&**point as &dyn Any).downcast_ref::<Event>())
            {
                // SAFETY: the launch keeps the event until it has landed.
                unsafe { self.stream.wait(event.raw()) }?;
            }
        }
        let mut reads = self.spare_reads.pop().unwrap_or_default();
        let address = self.ring.address(range.start);
        // SAFETY: just taken; the device does not know of it yet.
        let bytes = unsafe { self.ring.bytes_mut(range.clone()) };
        let mut unit =
            Unit::new(&self.layout, self.kernels.sealed(), launch, plan, &self.slab, bytes, address);
        let data_at = range.start + plan.data_at();
        let steps = self.next_step..self.next_step + plan.steps;
        let written = launch.steps[steps.clone()].iter().try_for_each(|step| {
            if let (Some(planes), Step::Read(read)) = (unit.write(step)?, step) {
                let planes = planes.map(|plane| data_at + plane.start..data_at + plane.end);
                reads.push(ReadBack { flight: read.flight, output_token: read.output_token, planes });
            }
            Ok(())
        });
        match written {
            // SAFETY: the ring keeps the range until the ticket is reached (5), the launch its payloads and pins until it
            // comes back, and the core's steps keep to the rest.
            Ok(()) => unsafe { unit.launch(&self.stream, &self.kernels, &self.near) }?,
            Err(error) => self.launches[self.enqueuing].error = Some(error),
        }
        self.fence.issue(&self.stream, &self.kernels)?;
        if ends_launch {
            self.tell_enqueued()?;
        }
        let flags = plan.flags();
        let flags = range.start + flags.start..range.start + flags.end;
        let transfer = self.carrier.as_ref().map_or(0, Carrier::submitted);
        self.units.push_back(Flying { ticket, flags, steps, reads, ends_launch, transfer, event: None });
        Ok(true)
    }

    /// An event behind everything on the stream.
    fn record(&self) -> Result<Event, DriverError> {
        let event = Event::new(self.stream.gpu())?;
        event.record(self.stream.raw())?;
        Ok(event)
    }

    /// Tells those who wait for it that the launch that is being enqueued is on the stream.
    fn tell_enqueued(&self) -> Result<(), DriverError> {
        let launch = &self.launches[self.enqueuing];
        if launch.is_awaited_enqueued() {
            let point: Arc<dyn Point> = Arc::new(self.record()?);
            launch.enqueued(&point);
        }
        Ok(())
    }

    /// Takes flags and outputs of finished units from the ring.
    fn retire(&mut self, done: &mut Vec<Launch>) {
        let reached = self.fence.reached();
        let carried = self.carrier.as_ref().map_or(0, Carrier::done);
        while self.units.front().is_some_and(|unit| unit.ticket <= reached && unit.transfer <= carried) {
            let Some(mut unit) = self.units.pop_front() else { return };
            let Some(launch) = self.launches.front_mut() else { return };
            // SAFETY: the unit's ticket was reached, so the device is done with its range (6).
            let flags = unsafe { self.ring.bytes_mut(unit.flags.clone()) };
            if flags.iter().any(|byte| *byte != 0) {
                let mut finite = flags.chunks_exact(4).map(|flag| flag == [0; 4]);
                for (flight, finite) in launch.flights.iter_mut().zip(&mut finite) {
                    flight.finite &= finite;
                }
                for (row, finite) in launch.steps[unit.steps.clone()].iter_mut().flat_map(rows_of).zip(finite)
                {
                    row.finite &= finite;
                }
            }
            for read in unit.reads.drain(..) {
                let Some(output) = &mut launch.flights[read.flight].output else { continue };
                let mut scorings = self.scorings.front_mut().into_iter().flatten();
                if let Some(scoring) = scorings.find(|scoring| scoring.flight() == read.flight) {
                    let [keys, _] = read.planes;
                    // SAFETY: as above.
                    let keys = unsafe { self.ring.bytes_mut(keys) };
                    scoring.take(&self.layout, read.output_token, keys, output.scores_mut());
                    continue;
                }
                for (plane, range) in Plane::BOTH.into_iter().zip(read.planes) {
                    let to = read.output_token * self.layout.token_bytes(plane);
                    // SAFETY: as above.
                    let bytes = unsafe { self.ring.bytes_mut(range) };
                    output.plane_mut(plane)[to..to + bytes.len()].copy_from_slice(bytes);
                }
            }
            self.spare_reads.push(unit.reads);
            self.ring.release(unit.ticket);
            if unit.ends_launch {
                self.enqueuing -= 1;
                self.scorings.pop_front();
                done.extend(self.launches.pop_front());
            }
        }
    }

    fn fail(&mut self, error: DriverError) {
        tracing::error!(target: "kv_cache::cuda", lane = ?self.kind, %error, "the device is lost");
        self.failed.get_or_insert(error);
    }
}

/// The rows of a step that have flags of their own.
fn rows_of(step: &mut Step) -> &mut [AppendRow] {
    match step {
        Step::AppendRows(rows) => &mut rows.rows,
        _ => &mut [],
    }
}

impl Lane for CudaLane {
    fn launch(&mut self, mut launch: Launch) {
        if let Some(carrier) = &mut self.carrier {
            carrier.take(&self.slab, &mut launch);
        }
        match expand(&self.layout, &self.staging, &mut launch) {
            Ok(scorings) => self.scorings.push_back(scorings),
            Err(error) => {
                // Nothing of it has begun.
                launch.steps.clear();
                launch.error = Some(error.to_string().into());
                self.scorings.push_back(Vec::new());
            }
        }
        split_large(&self.layout, &mut launch, self.ring.unit_bytes_max());
        self.launches.push_back(launch);
        if self.failed.is_none()
            && let Err(error) = self.stream.gpu().make_current().and_then(|()| self.pump())
        {
            self.fail(error);
        }
    }

    fn poll(&mut self, done: &mut Vec<Launch>) -> Result<(), DeviceLost> {
        if let Some(error) = self.failed.as_ref().or_else(|| self.waiter.lost()) {
            return Err(DeviceLost(error.to_string().into()));
        }
        if let Some(Err(error)) = self.carrier.as_mut().map(Carrier::poll) {
            self.fail(error);
        }
        self.retire(done);
        if self.enqueuing < self.launches.len()
            && let Err(error) = self.pump()
        {
            self.fail(error);
        }
        Ok(())
    }

    fn on_progress(&mut self, doorbell: Doorbell) {
        self.waiter.set_doorbell(doorbell);
        // This is the thread that will own the lane.
        if let Err(error) = self.stream.gpu().make_current() {
            self.fail(error);
        }
    }

    fn is_idle(&self) -> bool {
        self.launches.is_empty()
    }

    fn spin(&self) -> Duration {
        SPIN
    }

    fn ring_when_done(&mut self) {
        if let Some(event) = self.carrier.as_ref().and_then(Carrier::sleep)
            && let Err(error) = event.and_then(|event| self.waiter.arm(event))
        {
            self.fail(error);
            self.waiter.ring();
        }
        let Some(unit) = self.units.front_mut().filter(|unit| unit.ticket > self.armed) else {
            // A lane that has failed has no unit to wait for, but its owner has to learn of it.
            if self.failed.is_some() {
                self.waiter.ring();
            }
            return;
        };
        let ticket = unit.ticket;
        let event = match unit.event.take() {
            Some(event) => Ok(event),
            None => self.record(),
        };
        match event.and_then(|event| self.waiter.arm(event)) {
            Ok(()) => self.armed = ticket,
            Err(error) => {
                self.fail(error);
                self.waiter.ring();
            }
        }
    }
}

impl Drop for CudaLane {
    fn drop(&mut self) {
        // Nothing on the stream may outlive the ring and the slab (1). An error means that nothing runs any more.
        if self.stream.gpu().make_current().is_ok() {
            let _ = self.stream.synchronize();
        }
    }
}
