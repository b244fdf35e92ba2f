//! The body of a streamed answer: a buffer that the turn fills and the connection empties.
//!
//! Not a channel of pieces: events are written straight into one growing buffer, and the connection takes all that is
//! there at once. So a token costs no allocation, and events that queue up leave in one write. The buffer's bound is
//! the answer's own, and what all requests may hold: a slow client never slows the turn down, it is buffered up to its last
//! token, or until the memory for all is used up, and then cut.

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, Waker};

use bytes::{Bytes, BytesMut};
use hyper::body::{Body, Frame};

use super::memory::Charge;

/// Space made at the beginning: an answer of about 16 tokens fits.
const FIRST_BYTES: usize = 4 << 10;

/// Why a body ends early.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Closed {
    #[error("the client left")]
    Gone,
    #[error("the client took too little in time")]
    Cut,
}

#[derive(Debug)]
struct State {
    buffer: BytesMut,
    /// For what is in the buffer beyond its first bytes.
    charge: Charge,
    /// Events in the buffer.
    events: usize,
    ended: bool,
    closed: Option<Closed>,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

impl State {
    fn cut(&mut self) {
        self.closed = Some(Closed::Cut);
        self.buffer = BytesMut::new();
        self.charge.clear();
    }
}

type Shared = Arc<Mutex<State>>;

fn lock(shared: &Shared) -> MutexGuard<'_, State> {
    shared.lock().expect("no panic while the buffer is held")
}

/// Makes both ends; at most `limit` events wait in between, and no more than `charge` may grow to.
pub fn outlet(limit: usize, charge: Charge) -> (Outlet, OutletBody) {
    let buffer = BytesMut::with_capacity(FIRST_BYTES);
    let state = State { buffer, charge, events: 0, ended: false, closed: None, reader: None, writer: None };
    let shared = Arc::new(Mutex::new(state));
    (Outlet { shared: shared.clone(), limit }, OutletBody { shared })
}

/// The turn's end.
#[derive(Debug)]
pub struct Outlet {
    shared: Shared,
    limit: usize,
}

impl Outlet {
    /// Adds one event, which `write` appends to the buffer. A full buffer cuts the client.
    pub fn event(&mut self, write: impl FnOnce(&mut BytesMut)) -> Result<(), Closed> {
        self.events(1, write)
    }

    /// Adds `count` events at once.
    pub fn events(&mut self, count: usize, write: impl FnOnce(&mut BytesMut)) -> Result<(), Closed> {
        let (reader, result) = {
            let mut state = lock(&self.shared);
            if let Some(closed) = state.closed {
                return Err(closed);
            }
            let mut full = state.events + count > self.limit;
            if !full {
                let before = state.buffer.len().max(FIRST_BYTES);
                write(&mut state.buffer);
                state.events += count;
                let more = state.buffer.len().saturating_sub(before);
                full = more > 0 && !state.charge.grow(more);
            }
            if full {
                state.cut();
            }
            (state.reader.take(), if full { Err(Closed::Cut) } else { Ok(()) })
        };
        if let Some(reader) = reader {
            reader.wake();
        }
        result
    }

    /// Whether the client has been given everything so far.
    pub fn drained(&self) -> bool {
        lock(&self.shared).buffer.is_empty()
    }

    /// Resolves when the client has left or was cut. Cancellation-safe.
    pub async fn gone(&self) -> Closed {
        std::future::poll_fn(|cx| self.poll(cx, |state| state.closed)).await
    }

    /// Resolves when everything was taken or the client has left. Cancellation-safe.
    async fn taken(&self) {
        std::future::poll_fn(|cx| {
            self.poll(cx, |state| (state.closed.is_some() || state.buffer.is_empty()).then_some(()))
        })
        .await;
    }

    fn poll<T>(&self, cx: &Context<'_>, ready: impl Fn(&State) -> Option<T>) -> Poll<T> {
        let mut state = lock(&self.shared);
        if let Some(value) = ready(&state) {
            return Poll::Ready(value);
        }
        match &mut state.writer {
            Some(waker) => waker.clone_from(cx.waker()),
            none => *none = Some(cx.waker().clone()),
        }
        Poll::Pending
    }

    /// Ends the answer: what is buffered still goes out.
    pub fn end(&mut self) {
        let reader = {
            let mut state = lock(&self.shared);
            state.ended = true;
            state.reader.take()
        };
        if let Some(reader) = reader {
            reader.wake();
        }
    }

    /// After `end`: waits until the client took the rest, at most `limit`, and then cuts it and frees the buffer.
    pub async fn drain(self, limit: std::time::Duration) {
        if self.drained() || tokio::time::timeout(limit, self.taken()).await.is_ok() {
            return;
        }
        let mut state = lock(&self.shared);
        state.cut();
        if let Some(reader) = state.reader.take() {
            reader.wake();
        }
    }
}

/// A turn that drops its end without `end` (a panic) breaks the body off, so that no client takes it for whole.
impl Drop for Outlet {
    fn drop(&mut self) {
        let mut state = lock(&self.shared);
        if !state.ended && state.closed.is_none() {
            state.closed = Some(Closed::Cut);
        }
        if let Some(reader) = state.reader.take() {
            reader.wake();
        }
    }
}

/// The connection's end.
#[derive(Debug)]
pub struct OutletBody {
    shared: Shared,
}

impl Body for OutletBody {
    type Data = Bytes;
    type Error = Closed;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Closed>>> {
        let mut state = lock(&self.shared);
        if !state.buffer.is_empty() {
            let bytes = state.buffer.split().freeze();
            state.events = 0;
            state.charge.clear();
            // The turn waits for this only after its end; before, it waits for the client to leave.
            let writer = if state.ended { state.writer.take() } else { None };
            drop(state);
            if let Some(writer) = writer {
                writer.wake();
            }
            return Poll::Ready(Some(Ok(Frame::data(bytes))));
        }
        if let Some(closed) = state.closed {
            return Poll::Ready(Some(Err(closed)));
        }
        if state.ended {
            return Poll::Ready(None);
        }
        match &mut state.reader {
            Some(waker) => waker.clone_from(cx.waker()),
            none => *none = Some(cx.waker().clone()),
        }
        Poll::Pending
    }

    fn is_end_stream(&self) -> bool {
        let state = lock(&self.shared);
        state.ended && state.closed.is_none() && state.buffer.is_empty()
    }
}

impl Drop for OutletBody {
    fn drop(&mut self) {
        let writer = {
            let mut state = lock(&self.shared);
            state.closed.get_or_insert(Closed::Gone);
            state.buffer = BytesMut::new();
            state.charge.clear();
            state.writer.take()
        };
        if let Some(writer) = writer {
            writer.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::memory::Memory;
    use super::{Closed, FIRST_BYTES, Outlet, OutletBody};
    use bytes::{BufMut, Bytes};
    use http_body_util::BodyExt;
    use hyper::body::Body as _;
    use std::time::Duration;

    /// With memory for so many bytes beyond the first.
    fn outlet_within(limit: usize, bytes: usize) -> (Outlet, OutletBody) {
        super::outlet(limit, Memory::new(bytes).charge(0).unwrap())
    }
    fn outlet(limit: usize) -> (Outlet, OutletBody) {
        outlet_within(limit, 0)
    }

    fn put(outlet: &mut Outlet, text: &str) -> Result<(), Closed> {
        outlet.event(|buffer| buffer.put_slice(text.as_bytes()))
    }

    async fn take(body: &mut OutletBody) -> Option<Result<Bytes, Closed>> {
        Some(body.frame().await?.map(|frame| frame.into_data().expect("only data")))
    }

    #[tokio::test]
    async fn waiting_events_leave_in_one_frame() {
        let (mut outlet, mut body) = outlet(10);
        put(&mut outlet, "a").unwrap();
        put(&mut outlet, "b").unwrap();
        assert_eq!(take(&mut body).await.unwrap().unwrap(), "ab");
        put(&mut outlet, "c").unwrap();
        outlet.end();
        assert_eq!(take(&mut body).await.unwrap().unwrap(), "c");
        assert!(body.is_end_stream() && take(&mut body).await.is_none());
    }

    #[tokio::test]
    async fn a_reader_that_waits_is_woken() {
        let (mut outlet, mut body) = outlet(10);
        let reader = tokio::spawn(async move { take(&mut body).await });
        tokio::task::yield_now().await;
        put(&mut outlet, "late").unwrap();
        assert_eq!(reader.await.unwrap().unwrap().unwrap(), "late");
    }

    #[tokio::test]
    async fn a_client_that_takes_nothing_is_buffered_to_the_bound_and_then_cut() {
        let (mut outlet, mut body) = outlet(2);
        put(&mut outlet, "a").unwrap();
        put(&mut outlet, "b").unwrap();
        assert_eq!(put(&mut outlet, "c"), Err(Closed::Cut));
        assert_eq!(outlet.gone().await, Closed::Cut);
        assert_eq!(take(&mut body).await, Some(Err(Closed::Cut)));
    }

    #[tokio::test]
    async fn a_client_that_is_behind_is_cut_when_the_memory_for_all_is_used_up() {
        let (mut outlet, mut body) = outlet_within(100, 10);
        put(&mut outlet, &"x".repeat(FIRST_BYTES)).unwrap();
        put(&mut outlet, "0123456789").unwrap();
        assert_eq!(take(&mut body).await.unwrap().unwrap().len(), FIRST_BYTES + 10);
        put(&mut outlet, &"x".repeat(FIRST_BYTES)).unwrap();
        assert_eq!(put(&mut outlet, "01234567890"), Err(Closed::Cut));
        assert_eq!(take(&mut body).await, Some(Err(Closed::Cut)));
    }

    #[tokio::test]
    async fn a_client_that_leaves_is_noticed() {
        let (mut outlet, body) = outlet(2);
        let (gone, ()) = tokio::join!(outlet.gone(), async { drop(body) });
        assert_eq!(gone, Closed::Gone);
        assert_eq!(put(&mut outlet, "a"), Err(Closed::Gone));
    }

    #[tokio::test]
    async fn an_ended_answer_waits_for_a_slow_client_only_so_long() {
        let (mut outlet, mut body) = outlet(2);
        put(&mut outlet, "rest").unwrap();
        outlet.end();
        outlet.drain(Duration::from_millis(10)).await;
        assert_eq!(take(&mut body).await, Some(Err(Closed::Cut)));
    }

    #[tokio::test]
    async fn draining_ends_as_soon_as_the_rest_was_taken() {
        let (mut outlet, mut body) = outlet(2);
        put(&mut outlet, "rest").unwrap();
        outlet.end();
        let (taken, ()) = tokio::join!(take(&mut body), outlet.drain(Duration::MAX));
        assert_eq!(taken.unwrap().unwrap(), "rest");
        assert!(take(&mut body).await.is_none());
    }

    #[tokio::test]
    async fn an_answer_that_was_never_ended_breaks_off() {
        let (outlet, mut body) = outlet(2);
        drop(outlet);
        assert_eq!(take(&mut body).await, Some(Err(Closed::Cut)));
    }
}
