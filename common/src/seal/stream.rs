//! A long secret as a stream of sealed chunks: what a backup file is made of.
//!
//! ```text
//! chunk: last u1, length u31 | ciphertext | tag 16
//! ```
//! The key is made of the master key, a purpose and the caller's header, so that a header that was changed, or that
//! belongs to another stream, opens nothing; the header must therefore hold something that never comes twice. A chunk's
//! nonce is its number and whether it is the last, so that chunks that were swapped, repeated, left out or cut off at
//! the end are noticed. Source: Hoang et al. 2015, "Online Authenticated-Encryption and its Nonce-Reuse
//! Misuse-Resistance" (STREAM). Nothing is given out before its chunk was checked; that the stream is whole is known
//! only at its end.

use std::io::{self, Read, Write};

use ring::{aead, hmac};

use super::{MasterKey, TAG_BYTES, nonce_of};

/// Plain bytes of a chunk; the last may have fewer.
pub const CHUNK_BYTES: usize = 1 << 20;
const LAST: u32 = 1 << 31;

/// Why a stream does not open. Comes as the inner error of an `io::Error`.
#[derive(Debug, thiserror::Error)]
pub enum Broken {
    #[error("it is cut off after {0} whole chunks: it was not written or copied to its end")]
    Truncated(u64),
    #[error("chunk {0} is damaged, changed or in the wrong place")]
    Damaged(u64),
    #[error("something follows its end")]
    Trailing,
}

impl From<Broken> for io::Error {
    fn from(broken: Broken) -> Self {
        io::Error::new(io::ErrorKind::InvalidData, broken)
    }
}

impl MasterKey {
    /// Which key this is, without saying anything of it: to tell a wrong key from a damaged file.
    pub fn fingerprint(&self) -> String {
        let tag = self.derived(&[b"fingerprint"]);
        tag.as_ref()[..8].iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// Begins to seal a stream. `header` must never be the same for two streams.
    pub fn seal_stream<W: Write>(&self, purpose: &str, header: &[u8], out: W) -> Sealing<W> {
        Sealing { key: self.stream_key(purpose, header), number: 0, plain: Vec::with_capacity(CHUNK_BYTES), out }
    }

    /// Begins to open what `seal_stream` made with the same key, purpose and header.
    pub fn open_stream<R: Read>(&self, purpose: &str, header: &[u8], inner: R) -> Opening<R> {
        Opening { key: self.stream_key(purpose, header), number: 0, plain: Vec::new(), at: 0, ended: false, inner }
    }

    fn stream_key(&self, purpose: &str, header: &[u8]) -> aead::LessSafeKey {
        let key = self.derived(&[b"stream", purpose.as_bytes(), header]);
        let key = aead::UnboundKey::new(&aead::AES_256_GCM, key.as_ref()).expect("AES-256 takes 32 bytes");
        aead::LessSafeKey::new(key)
    }

    /// HMAC-SHA256 of parts, each with its length.
    fn derived(&self, parts: &[&[u8]]) -> hmac::Tag {
        let mut context = hmac::Context::with_key(&hmac::Key::new(hmac::HMAC_SHA256, &self.bytes));
        for part in parts {
            context.update(&(part.len() as u64).to_be_bytes());
            context.update(part);
        }
        context.sign()
    }
}

fn nonce(number: u64, last: bool) -> aead::Nonce {
    let mut bytes = [0; 12];
    bytes[0] = u8::from(last);
    bytes[4..].copy_from_slice(&number.to_be_bytes());
    nonce_of(bytes)
}

/// Seals what is written to it. Without `finish` the stream has no end and does not open whole.
pub struct Sealing<W> {
    key: aead::LessSafeKey,
    number: u64,
    plain: Vec<u8>,
    out: W,
}

impl<W: Write> Sealing<W> {
    /// Writes the last chunk; returns what was written to.
    pub fn finish(mut self) -> io::Result<W> {
        self.chunk(true)?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn chunk(&mut self, last: bool) -> io::Result<()> {
        let mut chunk = std::mem::take(&mut self.plain);
        let length = chunk.len() as u32 | if last { LAST } else { 0 };
        self.key
            .seal_in_place_append_tag(nonce(self.number, last), aead::Aad::empty(), &mut chunk)
            .expect("a chunk is shorter than AES-GCM's 64 GiB");
        self.number += 1;
        self.out.write_all(&length.to_be_bytes())?;
        self.out.write_all(&chunk)?;
        chunk.clear();
        self.plain = chunk;
        Ok(())
    }
}

impl<W: Write> Write for Sealing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.plain.len() == CHUNK_BYTES {
            self.chunk(false)?;
        }
        let taken = bytes.len().min(CHUNK_BYTES - self.plain.len());
        self.plain.extend_from_slice(&bytes[..taken]);
        Ok(taken)
    }
    /// Does nothing: a chunk leaves when it is full.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Opens a stream: reads nothing (0 bytes) only when its end was there and nothing follows.
pub struct Opening<R> {
    key: aead::LessSafeKey,
    number: u64,
    plain: Vec<u8>,
    at: usize,
    ended: bool,
    inner: R,
}

impl<R: Read> Opening<R> {
    /// Reads the next chunk, which must be there.
    fn chunk(&mut self) -> io::Result<()> {
        let mut length = [0; 4];
        self.whole(&mut length)?;
        let length = u32::from_be_bytes(length);
        let (last, length) = (length & LAST != 0, (length & !LAST) as usize);
        if length > CHUNK_BYTES {
            return Err(Broken::Damaged(self.number).into());
        }
        let mut chunk = std::mem::take(&mut self.plain);
        chunk.resize(length + TAG_BYTES, 0);
        self.whole(&mut chunk)?;
        let opened = self.key.open_in_place(nonce(self.number, last), aead::Aad::empty(), &mut chunk);
        opened.map_err(|_| Broken::Damaged(self.number))?;
        chunk.truncate(length);
        (self.plain, self.at, self.ended) = (chunk, 0, last);
        self.number += 1;
        Ok(())
    }

    fn whole(&mut self, buffer: &mut [u8]) -> io::Result<()> {
        match self.inner.read_exact(buffer) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Err(Broken::Truncated(self.number).into()),
            other => other,
        }
    }

    fn nothing_follows(&mut self) -> io::Result<()> {
        loop {
            match self.inner.read(&mut [0]) {
                Ok(0) => return Ok(()),
                Ok(_) => return Err(Broken::Trailing.into()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

impl<R: Read> Read for Opening<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.at == self.plain.len() && !buffer.is_empty() {
            if self.ended {
                self.nothing_follows()?;
                return Ok(0);
            }
            self.chunk()?;
        }
        let count = buffer.len().min(self.plain.len() - self.at);
        buffer[..count].copy_from_slice(&self.plain[self.at..self.at + count]);
        self.at += count;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> MasterKey {
        MasterKey::from_bytes([7; 32])
    }
    fn seal(plain: &[u8]) -> Vec<u8> {
        let mut sealing = key().seal_stream("test", b"header", Vec::new());
        sealing.write_all(plain).unwrap();
        sealing.finish().unwrap()
    }
    fn open(sealed: &[u8]) -> Result<Vec<u8>, String> {
        let mut plain = Vec::new();
        let opened = key().open_stream("test", b"header", sealed).read_to_end(&mut plain);
        opened.map(|_| plain).map_err(|error| error.to_string())
    }
    /// The chunks of a sealed stream.
    fn chunks(sealed: &[u8]) -> Vec<Vec<u8>> {
        let (mut chunks, mut rest) = (Vec::new(), sealed);
        while let Some((length, _)) = rest.split_first_chunk::<4>() {
            let (chunk, after) = rest.split_at(4 + (u32::from_be_bytes(*length) & !LAST) as usize + TAG_BYTES);
            chunks.push(chunk.to_vec());
            rest = after;
        }
        chunks
    }

    #[test]
    fn what_is_sealed_opens_at_any_length() {
        for length in [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES] {
            let plain: Vec<u8> = (0..length).map(|i| (i * 31 / 8) as u8).collect();
            assert!(open(&seal(&plain)).unwrap() == plain, "{length} bytes");
        }
    }

    #[test]
    fn chunks_that_are_swapped_repeated_left_out_or_cut_off_are_noticed() {
        let whole = chunks(&seal(&vec![5; 3 * CHUNK_BYTES + 9]));
        let [a, b, c, d] = &whole[..] else { panic!("{} chunks", whole.len()) };
        let said =
            |order: &[&Vec<u8>]| open(&order.iter().flat_map(|c| c.iter().copied()).collect::<Vec<_>>()).unwrap_err();
        assert!(said(&[b, a, c, d]).contains("chunk 0 is damaged"));
        assert!(said(&[a, a, b, c, d]).contains("chunk 1 is damaged"));
        assert!(said(&[a, c, d]).contains("chunk 1 is damaged"));
        assert!(said(&[a, b, d]).contains("chunk 2 is damaged"));
        assert!(said(&[a, b, c]).contains("cut off after 3 whole chunks"));
        assert!(said(&[]).contains("cut off after 0"));
        assert!(said(&[a, b, c, d, a]).contains("something follows"));
        let mut not_last = c.clone();
        not_last[0] |= 0x80;
        assert!(said(&[a, b, &not_last]).contains("chunk 2 is damaged"), "the end cannot be moved");
    }

    #[test]
    fn every_changed_or_missing_byte_is_noticed() {
        let sealed = seal(b"secret");
        for at in 0..sealed.len() {
            let mut bad = sealed.clone();
            bad[at] ^= 1;
            assert!(open(&bad).is_err(), "byte {at}");
            assert!(open(&sealed[..at]).is_err(), "cut at {at}");
        }
    }

    #[test]
    fn another_key_purpose_or_header_opens_nothing() {
        let sealed = seal(b"secret");
        let mut out = Vec::new();
        assert!(key().open_stream("other", b"header", &sealed[..]).read_to_end(&mut out).is_err());
        assert!(key().open_stream("test", b"headers", &sealed[..]).read_to_end(&mut out).is_err());
        let other = MasterKey::from_bytes([8; 32]);
        assert!(other.open_stream("test", b"header", &sealed[..]).read_to_end(&mut out).is_err());
        assert!(out.is_empty(), "nothing is given out before it was checked");
        assert_eq!(key().fingerprint().len(), 16);
        assert_ne!(key().fingerprint(), other.fingerprint());
    }

    #[test]
    fn a_stream_of_the_first_version_still_opens() {
        // Made with another implementation (Python's hmac and cryptography).
        let hex = GOLDEN;
        let sealed: Vec<u8> =
            (0..hex.len() / 2).map(|i| u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).unwrap()).collect();
        assert_eq!(open(&sealed).unwrap(), b"izar");
        assert_eq!(key().fingerprint(), FINGERPRINT);
    }
    const GOLDEN: &str = "80000004c5cf273123b878fda022e601c3d186ec744098be";
    const FINGERPRINT: &str = "91f584f349192112";
}
