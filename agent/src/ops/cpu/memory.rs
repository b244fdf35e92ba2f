//! Memory for weights, caches and activations.
//!
//! Weights and caches lie on huge pages where the system has them to give. A step reads all weights once: with pages of
//! 4 KiB one core spends as much time on finding pages as on reading them, with 2 MiB a single stream reads nearly as
//! fast as the memory can. Matrices are smaller than a huge page, so many share a block. Activations are taken from what
//! earlier operations have done with: memory that comes anew from the system costs a tenth of a step.

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::cell::RefCell;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// A huge page.
const PAGE: usize = 2 << 20;

/// Memory that pieces are cut from.
const BLOCK: usize = 32 << 20;

/// What pieces begin at: a line of the processor's cache.
const LINE: usize = 64;

/// Memory of whole pages.
#[derive(Debug)]
struct Block {
    first: NonNull<u8>,
    layout: Layout,
}

// SAFETY: a block only owns its memory; who may touch which part is the matter of `Memory`.
unsafe impl Send for Block {}
// SAFETY: as above.
unsafe impl Sync for Block {}

impl Block {
    fn new(bytes: usize) -> Self {
        let layout = Layout::from_size_align(bytes.next_multiple_of(PAGE), PAGE).expect("sizes fit an address space");
        // SAFETY: the size is not zero.
        let first = unsafe { alloc(layout) };
        let Some(first) = NonNull::new(first) else { handle_alloc_error(layout) };
        // SAFETY: the pages were just allocated, and nothing is in them.
        unsafe { advise(first, layout.size()) };
        Self { first, layout }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout, and the last piece is gone.
        unsafe { dealloc(self.first.as_ptr(), self.layout) }
    }
}

/// A piece of a block, its own.
#[derive(Debug)]
pub struct Memory {
    first: NonNull<u8>,
    bytes: usize,
    /// Keeps the memory.
    _block: Arc<Block>,
}

// SAFETY: a piece is bytes that nobody else has.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    /// Zeros, from the border of a cache line on.
    pub fn zeroed(bytes: usize) -> Self {
        let (block, at) = if bytes > BLOCK / 4 { (Arc::new(Block::new(bytes)), 0) } else { cut(bytes) };
        // SAFETY: the piece lies in the block, and nobody else has been given it.
        let first = unsafe {
            let first = block.first.add(at);
            first.write_bytes(0, bytes);
            first
        };
        Self { first, bytes, _block: block }
    }
}

impl Deref for Memory {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: the block lives, the bytes are written, and who changes them has the only reference.
        unsafe { std::slice::from_raw_parts(self.first.as_ptr(), self.bytes) }
    }
}

impl DerefMut for Memory {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.first.as_ptr(), self.bytes) }
    }
}

/// Cuts a piece from the block that is being filled; a block is kept by its pieces alone.
fn cut(bytes: usize) -> (Arc<Block>, usize) {
    static FILLED: Mutex<(Weak<Block>, usize)> = Mutex::new((Weak::new(), 0));
    let mut filled = FILLED.lock().unwrap_or_else(PoisonError::into_inner);
    let block = filled.0.upgrade().filter(|block| filled.1 + bytes <= block.layout.size());
    let block = block.unwrap_or_else(|| {
        let block = Arc::new(Block::new(BLOCK));
        *filled = (Arc::downgrade(&block), 0);
        block
    });
    let at = filled.1;
    filled.1 = (at + bytes).next_multiple_of(LINE);
    (block, at)
}

/// Asks for huge pages under memory that was allocated and not touched yet. That there are none is no error: it is only
/// slower.
///
/// # Safety
/// The memory belongs to the caller.
unsafe fn advise(first: NonNull<u8>, bytes: usize) {
    #[cfg(target_os = "linux")]
    {
        let into = first.as_ptr().align_offset(4096);
        if let Some(rest) = bytes.checked_sub(into) {
            // SAFETY: the pages that begin in the memory are the caller's; advice changes nothing that is in them.
            let advice = nix::sys::mman::MmapAdvise::MADV_HUGEPAGE;
            let _ = unsafe { nix::sys::mman::madvise(first.add(into).cast(), rest / 4096 * 4096, advice) };
        }
    }
}

/// Zeros in a vector, on huge pages where they are whole in it.
pub fn zeros<T: Copy + Default>(count: usize) -> Vec<T> {
    let mut out: Vec<T> = Vec::with_capacity(count);
    if let Some(first) = NonNull::new(out.as_mut_ptr()) {
        // SAFETY: the vector's own memory, which nothing is in.
        unsafe { advise(first.cast(), count * size_of::<T>()) };
    }
    out.resize(count, T::default());
    out
}

/// Vectors that a thread keeps for the next operations.
const SPARE: usize = 16;

thread_local! {
    static SPARES: RefCell<Vec<Vec<f32>>> = const { RefCell::new(Vec::new()) };
}

/// A vector of so many numbers, which are to be written: they are whatever was there before.
pub fn room(count: usize) -> Vec<f32> {
    let fitting = SPARES.with_borrow_mut(|spares| {
        let fitting = spares.iter().enumerate().filter(|(_, spare)| spare.capacity() >= count);
        let best = fitting.min_by_key(|(_, spare)| (spare.len() != count, spare.capacity())).map(|(at, _)| at);
        best.map(|at| spares.swap_remove(at))
    });
    let mut room = fitting.unwrap_or_default();
    room.resize(count, 0.0);
    room
}

/// Takes a vector back whose numbers are not needed any more.
pub fn spare(vector: Vec<f32>) {
    SPARES.with_borrow_mut(|spares| {
        spares.push(vector);
        if spares.len() > SPARE {
            let smallest = spares.iter().enumerate().min_by_key(|(_, spare)| spare.capacity()).map(|(at, _)| at);
            smallest.map(|at| spares.swap_remove(at));
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_zero_aligned_and_apart() {
        let sizes = [1, 64, 1000, 3 << 20, BLOCK / 4, BLOCK / 4 + 1, 5];
        let mut pieces = sizes.map(Memory::zeroed);
        for (i, piece) in pieces.iter_mut().enumerate() {
            assert!(piece.iter().all(|byte| *byte == 0) && piece.as_ptr().align_offset(LINE) == 0);
            piece.fill(i as u8 + 1);
        }
        assert!(pieces.iter().enumerate().all(|(i, piece)| piece.iter().all(|byte| usize::from(*byte) == i + 1)));
        assert_eq!(pieces.iter().map(|p| p.len()).collect::<Vec<_>>(), sizes);
    }

    #[test]
    fn rooms_are_used_again() {
        let first = room(1000);
        let at = first.as_ptr();
        spare(first);
        let small = room(10);
        assert_eq!((small.as_ptr(), small.len()), (at, 10));
        spare(small);
        (0..40).for_each(|_| spare(vec![1.0; 4]));
        let (again, new) = (room(1000), room(5000));
        assert_eq!((again.as_ptr(), new.len()), (at, 5000));
    }

    #[test]
    fn zeros_are_as_many_as_wanted() {
        assert_eq!(zeros::<u16>(3 << 20), vec![0; 3 << 20]);
        assert!(zeros::<f32>(0).is_empty());
    }
}
