//! Picks a backend per device, and holds all of the project's `unsafe` code, each backend under a safety chapter of its own.

pub(crate) mod cpu;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use kv_cache_actors::assembly::Assembler;
use kv_cache_actors::device::CoreConfig;
use kv_cache_actors::pool::PoolLayout;
use kv_cache_actors::reach::{LentMemory, PlainMemory};

use crate::config::{CacheConfig, Devices};
use crate::error::{BuildError, Error};
use crate::key_means::Centres;
use crate::view::Pinned;

/// A device that was chosen, not yet opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Device {
    /// A shard in host memory.
    Cpu(u16),
    /// A GPU, by the driver's number.
    #[cfg(feature = "cuda")]
    Cuda(u16),
}

impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Device::Cpu(number) => write!(f, "CPU device {number}"),
            #[cfg(feature = "cuda")]
            Device::Cuda(number) => write!(f, "GPU {number}"),
        }
    }
}

impl Device {
    fn failed(&self, reason: impl std::fmt::Display) -> BuildError {
        BuildError::Device { device: self.to_string(), reason: reason.to_string() }
    }
}

/// Memory of an open device that handles may look into.
#[derive(Debug, Clone)]
pub(crate) enum Memory {
    /// A slab in host memory.
    Cpu(Arc<cpu::Slab>),
    /// A slab in a GPU's memory.
    #[cfg(feature = "cuda")]
    Cuda(Arc<cuda::Slab>),
}

impl Memory {
    /// Where the slab begins in its device's memory.
    pub(crate) fn address(&self) -> usize {
        match self {
            Memory::Cpu(slab) => slab.address(),
            #[cfg(feature = "cuda")]
            Memory::Cuda(slab) => slab.address() as usize,
        }
    }

    /// Where a byte of the slab or the host tier is, as the device sees it.
    pub(crate) fn address_of(&self, offset: usize) -> u64 {
        match self {
            Memory::Cpu(slab) => (slab.address() + offset) as u64,
            #[cfg(feature = "cuda")]
            Memory::Cuda(slab) => slab.address_of(offset),
        }
    }

    /// The GPU that it is on.
    pub(crate) fn device(&self) -> Option<u16> {
        match self {
            Memory::Cpu(_) => None,
            #[cfg(feature = "cuda")]
            Memory::Cuda(slab) => Some(slab.gpu().ordinal() as u16),
        }
    }

    /// Blocks sealed in one launch, so that a small operation waits no longer behind it than some 150 µs on a CPU, at about
    /// 10 µs a block of a common shape. A GPU seals hundreds in that time.
    pub(crate) fn seals_per_launch(&self) -> usize {
        match self {
            Memory::Cpu(_) => 16,
            #[cfg(feature = "cuda")]
            Memory::Cuda(_) => 1024,
        }
    }

    /// Bytes `inside` the slot at `slot`, which `view` pins: in place in host memory, and otherwise out of `copy`, into which
    /// the whole block is copied at the first look. That blocks for some microseconds.
    pub(crate) fn pinned<'a>(
        &'a self,
        slot: Range<usize>,
        inside: Range<usize>,
        #[cfg_attr(not(feature = "cuda"), expect(unused_variables))] copy: &'a OnceLock<
            Result<HostCopy, Error>,
        >,
        view: &'a Pinned,
    ) -> Result<&'a [u8], Error> {
        match self {
            Memory::Cpu(slab) => Ok(slab.pinned(slot.start + inside.start..slot.start + inside.end, view)),
            #[cfg(feature = "cuda")]
            Memory::Cuda(slab) => {
                let copied = copy.get_or_init(|| slab.pinned(slot, view));
                copied.as_ref().map(|copy| &bytemuck::cast_slice(copy)[inside]).map_err(Clone::clone)
            }
        }
    }
}

/// Bytes of a block, aligned for every element type.
pub(crate) type HostCopy = Vec<u64>;

/// Chooses devices, and says in one log line which and why.
pub(crate) fn choose(devices: Devices) -> Result<Vec<Device>, BuildError> {
    let (chosen, reason) = match devices {
        Devices::Cpu(count) => (cpus(count), "asked for".to_owned()),
        Devices::Cuda(count) => {
            let found =
                gpus().map_err(|reason| BuildError::Device { device: format!("{count} GPUs"), reason })?;
            if found.len() < count as usize {
                let reason = format!("{} were found; ask for fewer, or for `auto`", found.len());
                return Err(BuildError::Device { device: format!("{count} GPUs"), reason });
            }
            (found[..count as usize].to_vec(), "asked for".to_owned())
        }
        Devices::Auto => match gpus() {
            Ok(gpus) => (gpus, "every GPU that was found".to_owned()),
            Err(reason) => (cpus(1), reason),
        },
    };
    let names: Vec<String> = chosen.iter().map(ToString::to_string).collect();
    tracing::info!(target: "kv_cache::devices", devices = names.join(", "), reason, "devices chosen");
    Ok(chosen)
}

fn cpus(count: u16) -> Vec<Device> {
    (0..count).map(Device::Cpu).collect()
}

/// Every GPU, or why there is none.
#[cfg(feature = "cuda")]
pub(crate) fn gpus() -> Result<Vec<Device>, String> {
    cuda::usable_gpus().map(|gpus| gpus.into_iter().map(Device::Cuda).collect())
}

#[cfg(not(feature = "cuda"))]
pub(crate) fn gpus() -> Result<Vec<Device>, String> {
    Err("built without the `cuda` feature".into())
}

/// Allocates the slabs of all devices.
pub(crate) fn allocate(devices: &[Device], pool: &PoolLayout) -> Result<Vec<Memory>, BuildError> {
    let in_host_memory = devices.iter().filter(|device| matches!(device, Device::Cpu(_))).count() as u64;
    let (slab, host) = (pool.slab_bytes() as u64, pool.host_bytes() as u64);
    let tiers = host.saturating_mul(devices.len() as u64);
    let requested_bytes = slab.saturating_mul(in_host_memory).saturating_add(tiers);
    if let Some(available_bytes) = cpu::available_bytes()
        && requested_bytes > available_bytes
    {
        let missing_bytes = requested_bytes - available_bytes;
        return Err(BuildError::Memory { requested_bytes, available_bytes, missing_bytes });
    }
    let slab = |device: &Device| match device {
        Device::Cpu(_) => match cpu::Slab::allocate(pool.slab_bytes() + pool.host_bytes()) {
            Some(slab) => Ok(Memory::Cpu(Arc::new(slab))),
            None => Err(device.failed(format_args!("the allocator refused {requested_bytes} bytes"))),
        },
        #[cfg(feature = "cuda")]
        Device::Cuda(ordinal) => {
            let gpu = cuda::Gpu::shared(*ordinal as usize).map_err(|error| device.failed(error))?;
            match cuda::Slab::allocate(&gpu, pool.slab_bytes(), pool.host_bytes()) {
                Ok(slab) => Ok(Memory::Cuda(Arc::new(slab))),
                Err(cuda::DriverError::Memory { requested_bytes, free_bytes, .. }) => {
                    Err(BuildError::Memory {
                        requested_bytes,
                        available_bytes: free_bytes,
                        missing_bytes: requested_bytes - free_bytes,
                    })
                }
                Err(error) => Err(device.failed(error)),
            }
        }
    };
    devices.iter().map(slab).collect()
}

/// Lends memory for batches: memory that the GPUs reach, if there are any and some of it is free.
#[derive(Debug)]
pub(crate) struct Lender {
    #[cfg(feature = "cuda")]
    pinned: Option<cuda::Lender>,
}

impl Lender {
    /// A lender of `bytes` bytes for devices with these memories.
    #[cfg_attr(not(feature = "cuda"), expect(unused_variables))]
    pub(crate) fn new(devices: &[Device], memories: &[Memory], bytes: u64) -> Result<Lender, BuildError> {
        #[cfg(feature = "cuda")]
        for (device, memory) in devices.iter().zip(memories) {
            if let Memory::Cuda(slab) = memory {
                let lender =
                    cuda::Lender::new(slab.gpu(), bytes as usize).map_err(|error| device.failed(error))?;
                return Ok(Lender { pinned: Some(lender) });
            }
        }
        Ok(Lender {
            #[cfg(feature = "cuda")]
            pinned: None,
        })
    }

    /// `bytes` bytes.
    pub(crate) fn lend(&self, bytes: usize) -> Box<dyn LentMemory> {
        #[cfg(feature = "cuda")]
        if let Some(lent) = self.pinned.as_ref().and_then(|pinned| pinned.lend(bytes)) {
            return lent;
        }
        Box::new(PlainMemory::new(bytes))
    }
}

/// Opens a device over its memory and starts its actors.
pub(crate) fn add_shard(
    assembler: &mut Assembler,
    device: &Device,
    memory: &Memory,
    core: CoreConfig,
    config: &CacheConfig,
    centres: Option<&Arc<Centres>>,
) -> Result<(), BuildError> {
    let added = match memory {
        Memory::Cpu(slab) => {
            let kernels = match config.auto_tune && !config.deterministic {
                true => cpu::codec::Kernels::tuned(),
                false => cpu::codec::Kernels::best(),
            };
            tracing::debug!(target: "kv_cache::devices", kernels = kernels.name(), "CPU kernels chosen");
            assembler.add_shard(cpu::CpuBackend::new(slab.clone(), kernels, centres.cloned()), core)
        }
        #[cfg(feature = "cuda")]
        Memory::Cuda(slab) => {
            let ring_bytes = (config.pinned_memory_bytes / cuda::RINGS) as usize;
            // Anybody may ask for it where it is not refused.
            let truncates = core.dropping.is_some_and(|dropping| dropping.truncation().is_some());
            let gathers = !truncates;
            assembler.add_shard(
                cuda::CudaBackend::new(
                    slab.clone(),
                    ring_bytes,
                    config.auto_tune && !config.deterministic,
                    gathers,
                    centres.cloned(),
                ),
                core,
            )
        }
    };
    added.map_err(|reason| device.failed(reason))
}
