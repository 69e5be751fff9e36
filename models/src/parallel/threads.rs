//! Ranks as threads of one process that exchange tensors through channels: the CPU.

use std::cell::Cell;
use std::sync::mpsc::{Receiver, Sender, channel};

use candle_core::Tensor;

use super::Communicator;
use crate::error::{Error, Result};

/// What one rank tells another: its tensor of a step, or that there will be none.
struct Message {
    step: u64,
    part: Result<Tensor, String>,
}

/// One rank of a group of threads. There is a channel from each rank to each other, so that the end of a rank ends
/// what others wait for.
pub(super) struct ThreadCommunicator {
    rank: usize,
    /// By rank; none to itself.
    senders: Vec<Option<Sender<Message>>>,
    receivers: Vec<Option<Receiver<Message>>>,
    step: Cell<u64>,
}

impl ThreadCommunicator {
    /// The communicators of a group of `world_size`.
    pub(super) fn group(world_size: usize) -> Vec<Self> {
        let new = |rank| Self { rank, senders: Vec::new(), receivers: Vec::new(), step: Cell::new(0) };
        let mut group: Vec<Self> = (0..world_size).map(new).collect();
        for from in 0..world_size {
            for to in 0..world_size {
                let (sender, receiver) = channel();
                let other = from != to;
                group[from].senders.push(other.then_some(sender));
                // Channels are made in the order of `from`, so each rank's receivers stand in the order of the others.
                group[to].receivers.push(other.then_some(receiver));
            }
        }
        group
    }

    fn send(&self, part: &Result<Tensor, String>) {
        for sender in self.senders.iter().flatten() {
            // A rank that has ended is noticed when its own part is missing.
            let _ = sender.send(Message { step: self.step.get(), part: part.clone() });
        }
    }

    fn receive(&self, from: usize, receiver: &Receiver<Message>) -> Result<Tensor> {
        loop {
            let message = receiver.recv();
            let message = message.map_err(|_| Error::Parallel(format!("rank {from} has ended")))?;
            match message.part {
                // Of a step that some rank could not finish.
                _ if message.step < self.step.get() => {}
                Ok(part) => return Ok(part),
                Err(why) => return Err(Error::Parallel(format!("rank {from} failed: {why}"))),
            }
        }
    }
}

impl Communicator for ThreadCommunicator {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.senders.len()
    }

    fn all_reduce_sum(&self, x: &Tensor) -> Result<Tensor> {
        let mut parts = self.all_gather(x)?.into_iter();
        // In the order of the ranks. A group has at least this one.
        let first = parts.next().unwrap_or_else(|| x.clone());
        parts.try_fold(first, |sum, part| Ok((sum + part)?))
    }

    fn all_gather(&self, x: &Tensor) -> Result<Vec<Tensor>> {
        // A copy, so that nobody sees what this rank makes of its own.
        let own = x.copy()?;
        self.send(&Ok(own.clone()));
        let receivers = self.receivers.iter().enumerate();
        receivers
            .map(|(from, receiver)| match receiver {
                Some(receiver) => self.receive(from, receiver),
                None => Ok(own.clone()),
            })
            .collect()
    }

    fn begin_step(&self, step: u64) {
        self.step.set(step);
    }

    fn fail(&self, why: &str) {
        self.send(&Err(why.to_owned()));
    }
}
