//! What a thread makes for a client that may be slower: a short queue between the two.
//!
//! The thread waits while the queue is full, and no longer than its [`Slot`] lets it: when that is given to
//! another because the client drips, what is in the queue is thrown away. Otherwise it would stay in memory
//! as long as the client likes.

use std::{future::poll_fn, sync::Arc};

use parking_lot::Mutex;
use tokio::sync::mpsc::{self, error::TrySendError};

use crate::slots::{Eviction, Slot};

/// The thread's end.
#[derive(Debug)]
pub struct ToClient<T> {
    sender: mpsc::Sender<T>,
    queue: Arc<Mutex<mpsc::Receiver<T>>>,
    slot: Arc<Slot>,
}

/// The client's end. When it is dropped, the thread is told.
#[derive(Debug)]
pub struct FromThread<T> {
    queue: Arc<Mutex<mpsc::Receiver<T>>>,
    eviction: Eviction,
}

/// Nobody will take more: the client has left, or drips while others wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the client has left, or was too slow while others waited")]
pub struct Gone;

/// A queue of so many messages.
pub fn channel<T>(messages: usize, slot: Arc<Slot>) -> (ToClient<T>, FromThread<T>) {
    let (sender, receiver) = mpsc::channel(messages);
    let queue = Arc::new(Mutex::new(receiver));
    let eviction = slot.eviction();
    (ToClient { sender, queue: Arc::clone(&queue), slot }, FromThread { queue, eviction })
}

impl<T> ToClient<T> {
    /// Sends at once if there is room; `bytes` is how much of the client's patience it takes.
    ///
    /// # Errors
    /// The message, to be given to [`Self::send_slowly`].
    pub fn try_send(&self, message: T, bytes: usize) -> Result<(), T> {
        match self.sender.try_send(message) {
            Ok(()) => {
                self.slot.progress(bytes);
                Ok(())
            }
            Err(TrySendError::Full(message) | TrySendError::Closed(message)) => Err(message),
        }
    }

    /// Sends when there is room, and waits for it.
    ///
    /// # Errors
    /// [`Gone`].
    pub fn send_slowly(&self, message: T, bytes: usize) -> Result<(), Gone> {
        let sent = self.slot.wait_for_client(self.sender.send(message));
        self.sent(sent.map(|sent| sent.is_ok()), bytes)
    }

    /// As [`Self::send_slowly`], for what may not block.
    ///
    /// # Errors
    /// [`Gone`].
    pub async fn send(&self, message: T) -> Result<(), Gone> {
        let sent = tokio::select! {
            biased;
            () = self.slot.evicted() => None,
            sent = self.sender.send(message) => Some(sent.is_ok()),
        };
        self.sent(sent, 0)
    }

    /// What has become of a message; none when the slot was given to another.
    fn sent(&self, sent: Option<bool>, bytes: usize) -> Result<(), Gone> {
        match sent {
            Some(true) => {
                self.slot.progress(bytes);
                Ok(())
            }
            Some(false) => Err(Gone),
            None => {
                discard(&self.queue);
                Err(Gone)
            }
        }
    }

    /// Whether nobody will take more.
    pub fn is_closed(&self) -> bool {
        self.sender.is_closed()
    }
}

impl<T> FromThread<T> {
    /// The next message; `None` when the thread has ended, or the slot was given to another.
    pub async fn recv(&mut self) -> Option<T> {
        poll_fn(|cx| self.queue.lock().poll_recv(cx)).await
    }

    /// Whether the end came too early, because the client was too slow while another waited.
    pub fn is_evicted(&self) -> bool {
        self.eviction.happened()
    }
}

impl<T> Drop for FromThread<T> {
    fn drop(&mut self) {
        discard(&self.queue);
    }
}

fn discard<T>(queue: &Mutex<mpsc::Receiver<T>>) {
    let mut queue = queue.lock();
    queue.close();
    while queue.try_recv().is_ok() {}
}
