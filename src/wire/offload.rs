//! Moves the expensive steps of a call off the runtime's two threads.
//!
//! To decode 4 MiB of empty strings, or to decompress 64 MiB, takes a thread for a tenth of a second, and
//! with two threads two such calls stall everybody. But the decoding happens deep inside the future of a
//! call, in generated code. So an [`Offload`] wraps that future, and when something inside asks for it
//! ([`here`], [`must_move`]), the future is polled by a thread of a small pool until it waits for
//! something else. The pool's size bounds how much is decoded at a time.

use std::{
    cell::Cell,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use tokio::{runtime::Handle, sync::oneshot};
use tracing::Span;

use crate::blocking::Pool;

/// Where the current thread polls a future.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// In no [`Offload`]: nothing can be moved.
    Unknown,
    /// In an [`Offload`], on a thread of the runtime.
    Runtime,
    /// In an [`Offload`], on a thread of its pool.
    Pool,
}

thread_local! {
    static PLACE: Cell<Place> = const { Cell::new(Place::Unknown) };
    static WANTED: Cell<bool> = const { Cell::new(false) };
}

/// Whether the caller, a future's `poll`, has to return `Pending` and is polled again on the pool.
pub fn must_move(cx: &Context<'_>) -> bool {
    if PLACE.get() != Place::Runtime {
        return false;
    }
    WANTED.set(true);
    cx.waker().wake_by_ref();
    true
}

/// Completes on a thread of the pool; what follows, up to the next wait, runs there. At once where
/// nothing can be moved.
pub async fn here() {
    std::future::poll_fn(|cx| match must_move(cx) {
        true => Poll::Pending,
        false => Poll::Ready(()),
    })
    .await;
}

/// Polls, and puts back what the thread knew.
fn poll_in<F: Future + ?Sized>(
    place: Place,
    future: Pin<&mut F>,
    cx: &mut Context<'_>,
) -> (Poll<F::Output>, bool) {
    struct Restore(Place, bool);
    impl Drop for Restore {
        fn drop(&mut self) {
            PLACE.set(self.0);
            WANTED.set(self.1);
        }
    }
    let _restore = Restore(PLACE.replace(place), WANTED.replace(false));
    let polled = future.poll(cx);
    (polled, WANTED.get())
}

/// A future whose expensive steps run on a pool.
pub struct Offload<F: Future> {
    state: State<F>,
    pool: Arc<Pool>,
}

/// A future that the pool has polled once, and the result.
type Polled<F> = (Pin<Box<F>>, Poll<<F as Future>::Output>);

enum State<F: Future> {
    Here(Pin<Box<F>>),
    There(oneshot::Receiver<Polled<F>>),
    Done,
}

impl<F: Future> std::fmt::Debug for Offload<F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Offload").field("pool", &self.pool).finish_non_exhaustive()
    }
}

impl<F: Future> Offload<F> {
    /// Wraps a future; `pool` polls it when it asks for it.
    pub fn new(pool: Arc<Pool>, future: F) -> Self {
        Self { state: State::Here(Box::pin(future)), pool }
    }
}

impl<F> Future for Offload<F>
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        loop {
            match std::mem::replace(&mut self.state, State::Done) {
                State::Done => return Poll::Pending,
                State::Here(mut future) => {
                    let (polled, wanted) = poll_in(Place::Runtime, future.as_mut(), cx);
                    if polled.is_ready() {
                        return polled;
                    }
                    self.state = match wanted {
                        true => State::There(move_to(&self.pool, future, cx)),
                        false => State::Here(future),
                    };
                    if !wanted {
                        return Poll::Pending;
                    }
                }
                State::There(mut polled) => match Pin::new(&mut polled).poll(cx) {
                    Poll::Pending => {
                        self.state = State::There(polled);
                        return Poll::Pending;
                    }
                    Poll::Ready(Ok((_, Poll::Ready(output)))) => return Poll::Ready(output),
                    // Its waker may have been used up meanwhile, so it is polled here again.
                    Poll::Ready(Ok((future, Poll::Pending))) => self.state = State::Here(future),
                    // The job panicked, or the pool had no thread: as if it had panicked here.
                    Poll::Ready(Err(_)) => {
                        std::panic::resume_unwind(Box::new("a call that was moved has failed"));
                    }
                },
            }
        }
    }
}

/// Polls a future once on the pool. How many wait there is bounded by the memory that they hold.
fn move_to<F>(
    pool: &Pool,
    mut future: Pin<Box<F>>,
    cx: &Context<'_>,
) -> oneshot::Receiver<Polled<F>>
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    let (done, polled) = oneshot::channel();
    let (waker, runtime, span) = (cx.waker().clone(), Handle::try_current(), Span::current());
    pool.run_later(move || {
        if done.is_closed() {
            return;
        }
        let _runtime = runtime.as_ref().map(Handle::enter);
        let _span = span.enter();
        let mut cx = Context::from_waker(&waker);
        let (polled, _) = poll_in(Place::Pool, future.as_mut(), &mut cx);
        // A call that has been dropped meanwhile is dropped here.
        let _ = done.send((future, polled));
    });
    polled
}

#[cfg(test)]
mod tests {
    use super::*;

    fn thread() -> String {
        std::thread::current().name().unwrap_or_default().to_owned()
    }

    #[tokio::test]
    async fn only_what_asks_for_it_is_moved() {
        let pool = Pool::new("test", 0, 1);
        let steps = Offload::new(Arc::clone(&pool), async {
            let before = thread();
            here().await;
            let there = thread();
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
            (before, there, thread())
        });
        let (before, there, after) = steps.await;
        assert_eq!(there, "envd-test");
        assert_eq!(before, after);
        assert_ne!(before, there);
        // Without a wrapper it stays where it is.
        let before = thread();
        here().await;
        assert_eq!(before, thread());
    }

    #[tokio::test]
    async fn a_panic_there_is_a_panic_of_the_call() {
        let pool = Pool::new("test", 0, 1);
        let call = Offload::new(pool, async {
            here().await;
            panic!("as it happens");
        });
        let task: tokio::task::JoinHandle<()> = tokio::spawn(call);
        assert!(task.await.unwrap_err().is_panic());
    }

    #[tokio::test]
    async fn waits_after_the_move_are_not_lost() {
        let pool = Pool::new("test", 0, 2);
        for _ in 0..200 {
            let (told, hears) = oneshot::channel();
            let call = tokio::spawn(Offload::new(Arc::clone(&pool), async {
                here().await;
                hears.await
            }));
            tokio::task::yield_now().await;
            told.send(7).unwrap();
            assert_eq!(call.await.unwrap(), Ok(7));
        }
    }
}
