//! Messages as bytes: a fixed envelope around a bincode payload, checked before anything is believed.
//!
//! ```text
//! magic u16 | type u16 | schema u16 | flags u16 | length u32 | crc32 u32 | payload
//! ```
//! Big-endian. The limit of a type is checked before its payload is read; the payload must be consumed whole, for
//! bincode ignores trailing bytes silently. No message type is recursive, and none holds a collection of zero-sized
//! items. A struct is never changed: a new form is a new variant, and old golden bytes still decode.
//! This file is the only home of bincode, so that another codec can replace it.

use bytes::{BufMut, BytesMut};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

pub mod agent;
pub mod handshake;
pub mod peer;
pub mod worker;

/// Oldest and newest schema that this build speaks. The handshake settles on the newest common one.
pub const SCHEMA: std::ops::RangeInclusive<u16> = 1..=1;

const MAGIC: u16 = 0x49_5a;
const HEADER_BYTES: usize = 16;
/// Room for one read: many small frames arrive together, and a quiet stream holds no more than this.
const READ_BYTES: usize = 4 << 10;

/// A message that may cross a process border.
pub trait Wire: Serialize + DeserializeOwned {
    /// Distinguishes messages; never reused.
    const TYPE: u16;
    /// Largest payload in bytes. A peer that announces more is cut off before the payload is read.
    const LIMIT: usize;
}

/// Why bytes are not a message.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("not an izar frame (magic {0:#06x})")]
    Magic(u16),
    #[error("frame of type {got}, expected type {expected}")]
    Type { got: u16, expected: u16 },
    #[error("frame of schema {0}, this build speaks {start} to {end}", start = SCHEMA.start(), end = SCHEMA.end())]
    Schema(u16),
    #[error("frame with unknown flags {0:#06x}")]
    Flags(u16),
    #[error("frame of {bytes} bytes, the limit of this type is {limit}")]
    TooLarge { bytes: usize, limit: usize },
    #[error("frame with a wrong checksum")]
    Checksum,
    #[error("payload does not decode: {0}")]
    Payload(String),
    #[error("payload has {0} bytes too many")]
    Trailing(usize),
    #[error("the stream ended inside a frame")]
    Truncated,
    #[error("read or write failed")]
    Io(#[from] std::io::Error),
}

impl Error {
    /// The peer or the stream went away. Everything else means that the peer sent what it must not.
    pub fn is_lost(&self) -> bool {
        matches!(self, Error::Truncated | Error::Io(_))
    }
}

fn codec<const LIMIT: usize>() -> impl bincode::config::Config {
    bincode::config::standard().with_big_endian().with_variable_int_encoding().with_limit::<LIMIT>()
}

/// Upper bound for every message; the limit of each type is checked besides.
const ANY_LIMIT: usize = 64 << 20;

/// Appends a message's frame to `out`.
///
/// Panics if the message is larger than its own limit: what we send, we bounded before.
pub fn encode<M: Wire>(message: &M, out: &mut BytesMut) {
    let start = out.len();
    out.put_bytes(0, HEADER_BYTES);
    bincode::serde::encode_into_std_write(message, &mut out.writer(), codec::<ANY_LIMIT>())
        .expect("writing to memory succeeds and our messages have known lengths");
    let payload = &out[start + HEADER_BYTES..];
    let (bytes, crc) = (payload.len(), crc32fast::hash(payload));
    assert!(bytes <= M::LIMIT, "message of type {} has {bytes} bytes, its limit is {}", M::TYPE, M::LIMIT);
    let mut header = &mut out[start..start + HEADER_BYTES];
    header.put_u16(MAGIC);
    header.put_u16(M::TYPE);
    header.put_u16(*SCHEMA.end());
    header.put_u16(0);
    header.put_u32(bytes as u32);
    header.put_u32(crc);
}

/// Returns a message's frame.
pub fn to_bytes<M: Wire>(message: &M) -> BytesMut {
    let mut out = BytesMut::new();
    encode(message, &mut out);
    out
}

/// The checksum of a frame's payload, for files that keep frames of their own.
pub fn checksum(bytes: &[u8]) -> u32 {
    crc32fast::hash(bytes)
}

/// Checks a header; returns the payload's length and checksum.
fn check_header<M: Wire>(header: &[u8; HEADER_BYTES]) -> Result<(usize, u32), Error> {
    let u16_at = |i: usize| u16::from_be_bytes([header[i], header[i + 1]]);
    let u32_at = |i: usize| u32::from_be_bytes([header[i], header[i + 1], header[i + 2], header[i + 3]]);
    if u16_at(0) != MAGIC {
        return Err(Error::Magic(u16_at(0)));
    }
    if u16_at(2) != M::TYPE {
        return Err(Error::Type { got: u16_at(2), expected: M::TYPE });
    }
    if !SCHEMA.contains(&u16_at(4)) {
        return Err(Error::Schema(u16_at(4)));
    }
    if u16_at(6) != 0 {
        return Err(Error::Flags(u16_at(6)));
    }
    let bytes = u32_at(8) as usize;
    if bytes > M::LIMIT {
        return Err(Error::TooLarge { bytes, limit: M::LIMIT });
    }
    Ok((bytes, u32_at(12)))
}

fn decode_payload<M: Wire>(payload: &[u8], crc: u32) -> Result<M, Error> {
    if crc32fast::hash(payload) != crc {
        return Err(Error::Checksum);
    }
    let (message, consumed) = bincode::serde::decode_from_slice(payload, codec::<ANY_LIMIT>())
        .map_err(|error| Error::Payload(error.to_string()))?;
    if consumed == payload.len() { Ok(message) } else { Err(Error::Trailing(payload.len() - consumed)) }
}

/// Takes one message off the front of `bytes`; returns it and the frame's length.
pub fn decode<M: Wire>(bytes: &[u8]) -> Result<(M, usize), Error> {
    let header = bytes.first_chunk::<HEADER_BYTES>().ok_or(Error::Truncated)?;
    let (length, crc) = check_header::<M>(header)?;
    let payload = bytes.get(HEADER_BYTES..HEADER_BYTES + length).ok_or(Error::Truncated)?;
    Ok((decode_payload(payload, crc)?, HEADER_BYTES + length))
}

/// Reads messages from a byte stream.
///
/// `next` is cancellation-safe: what was read stays in the buffer.
#[derive(Debug)]
pub struct Reader<R> {
    inner: R,
    buffer: BytesMut,
}

impl<R: AsyncRead + Unpin> Reader<R> {
    pub fn new(inner: R) -> Self {
        Self { inner, buffer: BytesMut::new() }
    }
    /// The stream below, for example to stop it.
    pub fn get_mut(&mut self) -> &mut R {
        &mut self.inner
    }
    /// Gives back the stream and what was read from it beyond the last message, for raw bytes that follow.
    pub fn into_parts(self) -> (R, BytesMut) {
        (self.inner, self.buffer)
    }
    /// Reads the next message, or `None` at a clean end.
    pub async fn next<M: Wire>(&mut self) -> Result<Option<M>, Error> {
        loop {
            let mut room = READ_BYTES;
            if let Some(header) = self.buffer.first_chunk::<HEADER_BYTES>() {
                let (length, crc) = check_header::<M>(header)?;
                if self.buffer.len() >= HEADER_BYTES + length {
                    let frame = self.buffer.split_to(HEADER_BYTES + length);
                    return decode_payload(&frame[HEADER_BYTES..], crc).map(Some);
                }
                room = room.max(HEADER_BYTES + length - self.buffer.len());
            }
            // Left to itself the buffer would grow by 64 bytes a read.
            self.buffer.reserve(room);
            if self.inner.read_buf(&mut self.buffer).await? == 0 {
                return if self.buffer.is_empty() { Ok(None) } else { Err(Error::Truncated) };
            }
        }
    }
    /// Reads a message that must be there.
    pub async fn expect<M: Wire>(&mut self) -> Result<M, Error> {
        self.next().await?.ok_or(Error::Truncated)
    }
}

/// Writes messages to a byte stream.
#[derive(Debug)]
pub struct Writer<W> {
    inner: W,
    buffer: BytesMut,
}

impl<W: AsyncWrite + Unpin> Writer<W> {
    pub fn new(inner: W) -> Self {
        Self { inner, buffer: BytesMut::new() }
    }
    pub fn get_mut(&mut self) -> &mut W {
        &mut self.inner
    }
    /// Puts a message into the buffer; `flush` sends it.
    pub fn put<M: Wire>(&mut self, message: &M) {
        encode(message, &mut self.buffer);
    }
    /// Bytes that wait for `flush`.
    pub fn buffered(&self) -> usize {
        self.buffer.len()
    }
    /// Sends what was put. Cancellation-safe: what was not sent stays.
    pub async fn flush(&mut self) -> std::io::Result<()> {
        while !self.buffer.is_empty() {
            if self.inner.write_buf(&mut self.buffer).await? == 0 {
                return Err(std::io::ErrorKind::WriteZero.into());
            }
        }
        self.inner.flush().await
    }
    /// Puts and sends one message.
    pub async fn send<M: Wire>(&mut self, message: &M) -> std::io::Result<()> {
        self.put(message);
        self.flush().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Note(String);
    impl Wire for Note {
        const TYPE: u16 = 0xfff0;
        const LIMIT: usize = 64;
    }

    fn frame() -> BytesMut {
        to_bytes(&Note("hello".into()))
    }

    #[test]
    fn a_frame_round_trips() {
        let bytes = frame();
        let (note, length) = decode::<Note>(&bytes).unwrap();
        assert_eq!((note, length), (Note("hello".into()), bytes.len()));
    }

    #[test]
    fn damage_is_refused() {
        let change = |at: usize, to: u8| {
            let mut bytes = frame();
            bytes[at] = to;
            decode::<Note>(&bytes).unwrap_err()
        };
        assert!(matches!(change(0, 0), Error::Magic(_)));
        assert!(matches!(change(3, 0), Error::Type { .. }));
        assert!(matches!(change(5, 99), Error::Schema(99)));
        assert!(matches!(change(7, 1), Error::Flags(1)));
        assert!(matches!(change(9, 1), Error::TooLarge { limit: 64, .. }));
        assert!(matches!(change(18, 0), Error::Checksum));
        let bytes = frame();
        assert!(matches!(decode::<Note>(&bytes[..bytes.len() - 1]), Err(Error::Truncated)));
    }

    #[test]
    fn trailing_bytes_in_a_payload_are_refused() {
        let mut payload = frame()[HEADER_BYTES..].to_vec();
        payload.push(0);
        let crc = crc32fast::hash(&payload);
        assert!(matches!(decode_payload::<Note>(&payload, crc), Err(Error::Trailing(1))));
    }

    #[tokio::test]
    async fn a_reader_takes_frames_in_any_pieces() {
        let mut bytes = frame();
        bytes.extend_from_slice(&frame());
        let (mut tx, rx) = tokio::io::duplex(3);
        let writer = tokio::spawn(async move { tx.write_all(&bytes).await });
        let mut reader = Reader::new(rx);
        assert_eq!(reader.expect::<Note>().await.unwrap(), Note("hello".into()));
        assert_eq!(reader.expect::<Note>().await.unwrap(), Note("hello".into()));
        assert!(reader.next::<Note>().await.unwrap().is_none());
        writer.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn many_small_frames_are_taken_in_few_reads() {
        /// Counts how often it is asked.
        struct Counted<'a>(&'a [u8], usize);
        impl AsyncRead for Counted<'_> {
            fn poll_read(
                mut self: std::pin::Pin<&mut Self>,
                cx: &mut std::task::Context<'_>,
                out: &mut tokio::io::ReadBuf<'_>,
            ) -> std::task::Poll<std::io::Result<()>> {
                self.1 += 1;
                std::pin::Pin::new(&mut self.0).poll_read(cx, out)
            }
        }
        let bytes = frame().repeat(1000);
        let mut reader = Reader::new(Counted(&bytes, 0));
        for _ in 0..1000 {
            reader.expect::<Note>().await.unwrap();
        }
        assert!(reader.next::<Note>().await.unwrap().is_none());
        let reads = reader.get_mut().1;
        assert!(reads <= 2 + bytes.len() / (READ_BYTES / 2), "{reads} reads of {} bytes", bytes.len());
    }

    #[tokio::test]
    async fn a_writer_that_takes_nothing_is_an_error_and_no_endless_loop() {
        struct Full;
        impl AsyncWrite for Full {
            fn poll_write(
                self: std::pin::Pin<&mut Self>,
                _: &mut std::task::Context<'_>,
                _: &[u8],
            ) -> std::task::Poll<std::io::Result<usize>> {
                std::task::Poll::Ready(Ok(0))
            }
            fn poll_flush(
                self: std::pin::Pin<&mut Self>,
                _: &mut std::task::Context<'_>,
            ) -> std::task::Poll<std::io::Result<()>> {
                std::task::Poll::Ready(Ok(()))
            }
            fn poll_shutdown(
                self: std::pin::Pin<&mut Self>,
                _: &mut std::task::Context<'_>,
            ) -> std::task::Poll<std::io::Result<()>> {
                std::task::Poll::Ready(Ok(()))
            }
        }
        let error = Writer::new(Full).send(&Note("hello".into())).await.unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::WriteZero);
    }
}
