//! Picks a backend per device, and holds all of the project's `unsafe` code, each backend under a safety chapter of its own.

pub(crate) mod cpu;

use std::sync::Arc;

use kv_cache_actors::pool::PoolLayout;

use crate::config::Devices;
use crate::error::BuildError;

/// A device that was chosen, not yet opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Device {
    /// A shard in host memory.
    Cpu(u16),
}

impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Device::Cpu(number) => write!(f, "CPU device {number}"),
        }
    }
}

/// Memory of an open device that handles may look into.
#[derive(Debug, Clone)]
pub(crate) enum Memory {
    /// A slab in host memory.
    Cpu(Arc<cpu::Slab>),
}

/// Chooses devices, and says in one log line which and why.
pub(crate) fn choose(devices: Devices) -> Vec<Device> {
    let (count, reason) = match devices {
        Devices::Cpu(count) => (count, "asked for".to_owned()),
        Devices::Auto => (1, no_gpu_reason()),
    };
    tracing::info!(target: "kv_cache::devices", cpu_devices = count, reason, "devices chosen");
    (0..count).map(Device::Cpu).collect()
}

#[cfg(feature = "cuda")]
fn no_gpu_reason() -> String {
    // SAFETY: looks for the driver library by name and loads it; it runs no code of ours.
    if !unsafe { cudarc::driver::sys::is_culib_present() } {
        return "no NVIDIA driver was found".into();
    }
    match cudarc::driver::CudaContext::device_count() {
        Ok(0) | Err(_) => "an NVIDIA driver was found, but no GPU".into(),
        Ok(count) => format!("{count} NVIDIA GPUs were found, but this version has no CUDA backend yet"),
    }
}

#[cfg(not(feature = "cuda"))]
fn no_gpu_reason() -> String {
    "built without the `cuda` feature".into()
}

/// Allocates the slabs of all devices.
pub(crate) fn allocate(devices: &[Device], pool: &PoolLayout) -> Result<Vec<Memory>, BuildError> {
    let requested_bytes = (pool.slab_bytes() as u64).saturating_mul(devices.len() as u64);
    if let Some(available_bytes) = cpu::available_bytes()
        && requested_bytes > available_bytes
    {
        let missing_bytes = requested_bytes - available_bytes;
        return Err(BuildError::Memory { requested_bytes, available_bytes, missing_bytes });
    }
    let slab = |device: &Device| match cpu::Slab::allocate(pool.slab_bytes()) {
        Some(slab) => Ok(Memory::Cpu(Arc::new(slab))),
        None => Err(BuildError::Device {
            device: device.to_string(),
            reason: format!("the allocator refused {} bytes", pool.slab_bytes()),
        }),
    };
    devices.iter().map(slab).collect()
}
