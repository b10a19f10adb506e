//! The slab: one allocation, handed out as ranges.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ops::Range;
use std::ptr::NonNull;

use crate::view::Pinned;

/// Pages, so that the system can hand out zero pages without touching them.
const ALIGN_BYTES: usize = 4096;

/// All blocks of one CPU device.
#[derive(Debug)]
pub(crate) struct Slab {
    base: NonNull<u8>,
    layout: Layout,
}

// SAFETY: the slab owns its allocation, and the accessors demand what makes shared access sound (invariants 2 to 4).
unsafe impl Send for Slab {}
// SAFETY: as above.
unsafe impl Sync for Slab {}

impl Slab {
    /// Allocates `bytes` zero bytes; none if the allocator refuses.
    pub(crate) fn allocate(bytes: usize) -> Option<Slab> {
        let layout = Layout::from_size_align(bytes.max(1), ALIGN_BYTES).ok()?;
        // SAFETY: the layout is not empty.
        let base = NonNull::new(unsafe { alloc_zeroed(layout) })?;
        Some(Slab { base, layout })
    }

    fn check(&self, range: &Range<usize>) {
        assert!(
            range.start <= range.end && range.end <= self.layout.size(),
            "bytes {range:?} of a slab of {}",
            self.layout.size()
        );
    }

    /// Where the slab begins, as a number for kernels of others.
    pub(crate) fn address(&self) -> usize {
        self.base.as_ptr() as usize
    }

    /// The bytes of `range`.
    ///
    /// # Safety
    /// Nobody writes to them while the slice lives (invariants 3 and 4).
    pub(crate) unsafe fn bytes(&self, range: Range<usize>) -> &[u8] {
        self.check(&range);
        // SAFETY: in bounds (1), initialised (5); the caller vouches for the rest.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr().add(range.start), range.len()) }
    }

    /// The bytes of `range`, which lies in rows of slots that `view` pins and shows.
    pub(crate) fn pinned<'a>(&'a self, range: Range<usize>, view: &'a Pinned) -> &'a [u8] {
        let _ = view;
        // SAFETY: the view holds pins on its slots for as long as it lives (3) and asks only for rows that were acknowledged
        // when it was made (4).
        unsafe { self.bytes(range) }
    }

    /// The bytes of `range`, to be written.
    ///
    /// # Safety
    /// Nobody else reads or writes them while the slice lives (invariant 2).
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn bytes_mut(&self, range: Range<usize>) -> &mut [u8] {
        self.check(&range);
        // SAFETY: in bounds (1), initialised (5); the caller vouches for the rest.
        unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr().add(range.start), range.len()) }
    }
}

impl Drop for Slab {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout; the last owner is here, so no reference is left.
        unsafe { dealloc(self.base.as_ptr(), self.layout) }
    }
}
