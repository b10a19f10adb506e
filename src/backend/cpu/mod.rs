//! The CPU device: a slab of host memory and lanes that work at once, on the thread that owns them. The reference semantics.
//!
//! # Safety chapter
//!
//! A slab is shared by a compute lane, two copy lanes and any number of readers, each on a thread of its own. References into
//! it are made from raw pointers, piece by piece; these invariants keep them apart. `SAFETY` comments name them.
//!
//! 1. **In bounds.** Every range is checked against the slab before a pointer is made of it.
//! 2. **One writer.** A step writes only slots (or rows of slots) that its launch owns: the device core gives a slot to one
//!    block, writes to a block only for the one sequence that holds it, and has one operation of a sequence in flight.
//! 3. **Readers are pinned.** Whoever reads a slot without owning it holds a pin under the slot's generation, and a slot is
//!    not claimed for another block while a pin is held ([`kv_cache_actors::slot`]).
//! 4. **Written rows only.** Readers of a block that is still being appended to look at rows of tokens that were acknowledged
//!    before; later appends write other rows. After tokens are cut off, the core copies a pinned block before it writes.
//! 5. **Initialised.** The slab is allocated zeroed and only bytes are stored in it.
//! 6. **Ordered.** What a reader learns of a row reaches it through the sequence's lock, which the device thread releases after
//!    the row was written; slots go from reader to next owner through the slot's atomic state.

pub(crate) mod codec;
mod lane;
mod slab;

pub(crate) use lane::CpuBackend;
pub(crate) use slab::Slab;

/// Bytes of memory that could be allocated now, where the system says so: what is free, within what a container may use.
pub(crate) fn available_bytes() -> Option<u64> {
    let info = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = info.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    // "max" or no such file: no limit of its own (cgroup v2).
    let number = |path: &str| std::fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let within = number("/sys/fs/cgroup/memory.max")
        .map(|max| max.saturating_sub(number("/sys/fs/cgroup/memory.current").unwrap_or(0)));
    Some(within.unwrap_or(u64::MAX).min(kib * 1024))
}
