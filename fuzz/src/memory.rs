//! Memory of which there is not more than small inputs account for: asking for more ends the process, which is a finding.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

/// Bytes that are in use at once, at most.
const MOST: usize = 1 << 30;

#[global_allocator]
static MEMORY: Limited = Limited(AtomicUsize::new(0));

/// The system's memory, and the bytes of it that are in use.
struct Limited(AtomicUsize);

impl Limited {
    /// Whether so many more are there; then they are counted.
    fn take(&self, bytes: usize) -> bool {
        let is_there = self.0.fetch_add(bytes, Ordering::Relaxed).saturating_add(bytes) <= MOST;
        if !is_there {
            self.0.fetch_sub(bytes, Ordering::Relaxed);
        }
        is_there
    }

    fn give_back(&self, bytes: usize) {
        self.0.fetch_sub(bytes, Ordering::Relaxed);
    }
}

// SAFETY: all memory is the system's; null is what says that there is none.
unsafe impl GlobalAlloc for Limited {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if !self.take(layout.size()) {
            return std::ptr::null_mut();
        }
        // SAFETY: the caller's promises are those that the system's allocator asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if !self.take(layout.size()) {
            return std::ptr::null_mut();
        }
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        self.give_back(layout.size());
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // Both are there for a moment.
        if !self.take(size) {
            return std::ptr::null_mut();
        }
        // SAFETY: as above.
        let moved = unsafe { System.realloc(pointer, layout, size) };
        self.give_back(if moved.is_null() { size } else { layout.size() });
        moved
    }
}
