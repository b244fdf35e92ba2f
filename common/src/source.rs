//! Where a model file's bytes lie: on the disk, or in memory for tests and fuzzing.
//!
//! Files are read, not mapped: a mapped file that is cut short under us kills the process, and mapping needs unsafe code.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

#[derive(Debug)]
pub(crate) enum Source {
    Disk(File),
    Memory(Vec<u8>),
}

impl Source {
    /// Reads a range that was checked to lie in the file. A file that was cut short since then is an error.
    pub(crate) fn read(&self, offset: u64, bytes: u64) -> io::Result<Vec<u8>> {
        match self {
            Self::Memory(all) => Ok(all[offset as usize..(offset + bytes) as usize].to_vec()),
            Self::Disk(file) => {
                let mut into = vec![0; bytes as usize];
                file.read_exact_at(&mut into, offset)?;
                Ok(into)
            }
        }
    }
}
