//! The items of a backup, written and read as a stream: rows, audit segments, model files, and the end that counts them.
//!
//! ```text
//! 1 row      length u32 | bytes
//! 2 segment  number u64 | length u64 | bytes
//! 3 file     hash 32    | length u64 | bytes
//! 9 end      length u32 | summary, JSON
//! ```
//! Integers are big-endian. What comes out of a reader was sealed by whoever had the master key, so lengths are
//! believed up to their limits; that a backup is whole is known when the end was read.

use std::io::{self, Read, Write};

use anyhow::{Context, bail, ensure};
use izar_common::id::Hash;
use izar_common::seal::MasterKey;
use izar_common::seal::stream::{Opening, Sealing};
use serde::{Deserialize, Serialize};

use super::{FORMAT, HEADER_LIMIT, Header, MAGIC, PURPOSE};

const ROW: u8 = 1;
const SEGMENT: u8 = 2;
const FILE: u8 = 3;
const END: u8 = 9;

/// Longest row: as the state stores them.
const ROW_LIMIT: usize = 8 << 20;
const SUMMARY_LIMIT: usize = 4 << 10;
/// Segments and files come in pieces of this size at most.
const PIECE_BYTES: usize = 1 << 20;

/// What a backup holds, by its end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Summary {
    pub rows: u64,
    pub segments: u64,
    pub audit_bytes: u64,
    pub files: u64,
    pub file_bytes: u64,
    /// Fingerprint of the rows, as members compare it.
    pub digest: Hash,
}

/// One item, or a piece of the segment or file that came last.
#[derive(Debug, PartialEq, Eq)]
pub enum Item {
    Row(Vec<u8>),
    Segment { number: u64, bytes: u64 },
    File { hash: Hash, bytes: u64 },
    Piece(Vec<u8>),
    End(Summary),
}

/// Writes a backup.
pub struct Writer<W: Write> {
    out: Sealing<W>,
    summary: Summary,
}

impl<W: Write> Writer<W> {
    /// Begins with the header.
    pub fn begin(mut out: W, header: &Header, key: &MasterKey) -> io::Result<Self> {
        let json = serde_json::to_vec(header)?;
        assert!(json.len() <= HEADER_LIMIT && header.format == FORMAT, "a header of ours is short and of our format");
        out.write_all(MAGIC)?;
        out.write_all(&(json.len() as u32).to_be_bytes())?;
        out.write_all(&json)?;
        let out = key.seal_stream(PURPOSE, &json, out);
        let digest = Hash([0; 32]);
        let summary = Summary { rows: 0, segments: 0, audit_bytes: 0, files: 0, file_bytes: 0, digest };
        Ok(Self { out, summary })
    }

    pub fn row(&mut self, row: &[u8]) -> io::Result<()> {
        self.summary.rows += 1;
        self.out.write_all(&[ROW])?;
        self.out.write_all(&(row.len() as u32).to_be_bytes())?;
        self.out.write_all(row)
    }

    /// Writes a segment: exactly `bytes` of what the reader gives.
    pub fn segment(&mut self, number: u64, bytes: u64, input: impl Read) -> io::Result<()> {
        self.summary.segments += 1;
        self.summary.audit_bytes += bytes;
        self.out.write_all(&[SEGMENT])?;
        self.out.write_all(&number.to_be_bytes())?;
        self.body(bytes, input)
    }

    /// Writes a file: exactly `bytes` of what the reader gives.
    pub fn file(&mut self, hash: &Hash, bytes: u64, input: impl Read) -> io::Result<()> {
        self.summary.files += 1;
        self.summary.file_bytes += bytes;
        self.out.write_all(&[FILE])?;
        self.out.write_all(&hash.0)?;
        self.body(bytes, input)
    }

    fn body(&mut self, bytes: u64, input: impl Read) -> io::Result<()> {
        self.out.write_all(&bytes.to_be_bytes())?;
        if io::copy(&mut input.take(bytes), &mut self.out)? < bytes {
            return Err(io::Error::other("a file is shorter than it was"));
        }
        Ok(())
    }

    /// Writes the end.
    pub fn finish(mut self, digest: Hash) -> io::Result<(W, Summary)> {
        self.summary.digest = digest;
        let json = serde_json::to_vec(&self.summary)?;
        self.out.write_all(&[END])?;
        self.out.write_all(&(json.len() as u32).to_be_bytes())?;
        self.out.write_all(&json)?;
        Ok((self.out.finish()?, self.summary))
    }
}

/// Reads a backup.
pub struct Reader<R: Read> {
    pub header: Header,
    input: Opening<R>,
    /// Bytes of the current segment or file that were not read yet.
    left: u64,
    ended: bool,
}

impl<R: Read> Reader<R> {
    /// Reads the header and looks whether the key is the right one.
    pub fn open(mut input: R, key: &MasterKey) -> anyhow::Result<Self> {
        let (header, bytes) = Header::read(&mut input)?;
        let fingerprint = key.fingerprint();
        ensure!(
            header.master_key == fingerprint,
            "it is sealed with another master key ({}; the one given is {fingerprint}): use the one that the cluster had \
             when it was made",
            header.master_key
        );
        Ok(Self { header, input: key.open_stream(PURPOSE, &bytes, input), left: 0, ended: false })
    }

    /// Reads the next item; `None` when the backup has ended, whole.
    pub fn item(&mut self) -> anyhow::Result<Option<Item>> {
        self.read().context("the backup is of no use: take another one")
    }

    fn read(&mut self) -> anyhow::Result<Option<Item>> {
        if self.left > 0 {
            let piece = self.bytes(self.left.min(PIECE_BYTES as u64) as usize)?;
            self.left -= piece.len() as u64;
            return Ok(Some(Item::Piece(piece)));
        }
        if self.ended {
            ensure!(self.input.read(&mut [0])? == 0, "something follows its last item");
            return Ok(None);
        }
        let [kind] = self.array()?;
        Ok(Some(match kind {
            ROW => Item::Row(self.short(ROW_LIMIT)?),
            SEGMENT => {
                let number = u64::from_be_bytes(self.array()?);
                self.left = u64::from_be_bytes(self.array()?);
                Item::Segment { number, bytes: self.left }
            }
            FILE => {
                let hash = Hash(self.array()?);
                self.left = u64::from_be_bytes(self.array()?);
                Item::File { hash, bytes: self.left }
            }
            END => {
                self.ended = true;
                Item::End(serde_json::from_slice(&self.short(SUMMARY_LIMIT)?).context("its last item")?)
            }
            other => bail!("it has an item of kind {other}, which this version does not know"),
        }))
    }

    fn short(&mut self, limit: usize) -> anyhow::Result<Vec<u8>> {
        let length = u32::from_be_bytes(self.array()?) as usize;
        ensure!(length <= limit, "an item of {length} bytes, the limit is {limit}");
        self.bytes(length)
    }

    fn bytes(&mut self, length: usize) -> anyhow::Result<Vec<u8>> {
        let mut bytes = vec![0; length];
        self.input.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> anyhow::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.input.read_exact(&mut bytes)?;
        Ok(bytes)
    }
}
