//! One thread a rank, and the model that they are together.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use candle_core::{Device, DeviceLocation, Tensor};
use ingle_kernels::gpu;

use super::threads::ThreadCommunicator;
use super::{Communicator, Place};
use crate::causal_lm::{CausalLm, LoadOptions, ModelInfo};
use crate::decoder::Decoder;
use crate::error::{Error, Result, invalid};
use crate::load::load_decoder;
use crate::{Batch, KvCache};

/// Makes a rank's communicator, on the rank's own thread and for its device.
pub(super) type Connect = Box<dyn FnOnce(&Device) -> Result<Box<dyn Communicator>> + Send>;

/// What a rank is asked.
enum Command {
    Forward { step: u64, batch: Arc<Batch>, cache: KvCache },
    NewCache { num_blocks: usize, block_size: usize },
}

/// What it answers, each command once.
enum Reply {
    Loaded(Result<Box<ModelInfo>>),
    Step {
        logits: Result<Tensor>,
        cache: KvCache,
    },
    Cache(Result<KvCache>),
    /// Its thread has ended, whatever it was asked.
    Ended,
}

/// A model whose weights are divided over several ranks.
pub(crate) struct TensorParallel {
    info: ModelInfo,
    /// Of the first rank, whose logits are the answer.
    device: Device,
    commands: Vec<Sender<Command>>,
    replies: Receiver<(usize, Reply)>,
    threads: Vec<JoinHandle<()>>,
    step: AtomicU64,
}

/// Loads the model in `path` over `options.tensor_parallel_size` ranks.
pub(crate) fn load(path: &Path, options: &LoadOptions) -> Result<TensorParallel> {
    let world_size = options.tensor_parallel_size;
    let devices =
        (0..world_size).map(|rank| device(path, &options.device, rank)).collect::<Result<Vec<_>>>()?;
    TensorParallel::spawn(path, options, devices, connections(path, &options.device, world_size)?)
}

/// Which device a rank is on: GPUs are numbered onwards from the one that was asked for.
fn device(path: &Path, first: &Device, rank: usize) -> Result<Device> {
    match first.location() {
        _ if rank == 0 => Ok(first.clone()),
        DeviceLocation::Cpu => Ok(Device::Cpu),
        DeviceLocation::Cuda { gpu_id } => {
            let gpu_id = gpu_id.saturating_add(rank);
            gpu::open_cuda(gpu_id)
                .map_err(|error| invalid(path, format!("rank {rank} wants GPU {gpu_id}: {error}")))
        }
        DeviceLocation::Metal { .. } => {
            Err(invalid(path, "tensor parallelism is for CUDA and the CPU, not for Metal"))
        }
    }
}

fn connections(path: &Path, device: &Device, world_size: usize) -> Result<Vec<Connect>> {
    if device.is_cpu() {
        let connect =
            |communicator: ThreadCommunicator| -> Connect { Box::new(|_| Ok(Box::new(communicator))) };
        return Ok(ThreadCommunicator::group(world_size).into_iter().map(connect).collect());
    }
    gpu_connections(path, world_size)
}

#[cfg(feature = "nccl")]
fn gpu_connections(_: &Path, world_size: usize) -> Result<Vec<Connect>> {
    super::nccl::connections(world_size)
}

#[cfg(not(feature = "nccl"))]
fn gpu_connections(path: &Path, _: usize) -> Result<Vec<Connect>> {
    Err(invalid(path, "this build cannot use several GPUs: it was built without the feature nccl"))
}

impl TensorParallel {
    /// Starts a thread for each of `connections` and waits until all have loaded their share.
    pub(super) fn spawn(
        path: &Path,
        options: &LoadOptions,
        devices: Vec<Device>,
        connections: Vec<Connect>,
    ) -> Result<Self> {
        let world_size = connections.len();
        let first = devices.first().cloned().unwrap_or(Device::Cpu);
        let (reply, replies) = channel();
        let (mut commands, mut threads) = (Vec::new(), Vec::new());
        for (rank, (connect, device)) in connections.into_iter().zip(devices).enumerate() {
            let (command, receiver) = channel();
            let mut options = LoadOptions { device, ..options.clone() };
            if rank > 0 {
                options.progress = None;
            }
            let worker = Worker {
                place: Place { rank, world_size },
                path: path.to_owned(),
                options,
                commands: receiver,
                replies: Replies { rank, sender: reply.clone() },
            };
            let builder = std::thread::Builder::new().name(format!("ingle-rank-{rank}"));
            let thread = builder.spawn(move || worker.run(connect));
            threads.push(thread.map_err(|source| Error::Io { path: path.to_owned(), source })?);
            commands.push(command);
        }
        let loaded = collect(&replies, world_size, |reply| match reply {
            Reply::Loaded(info) => info.map(Some),
            _ => Ok(None),
        });
        let infos = loaded.into_iter().collect::<Result<Vec<_>>>()?;
        let mut info =
            infos.first().map(|info| (**info).clone()).ok_or_else(|| Error::Parallel("no ranks".into()))?;
        info.weight_bytes = infos.iter().map(|info| info.weight_bytes).sum();
        if options.device.is_cpu() {
            // All in one memory; on GPUs each pays for its own from its own.
            info.kv_bytes_per_token = infos.iter().map(|info| info.kv_bytes_per_token).sum();
        }
        Ok(Self { info, device: first, commands, replies, threads, step: AtomicU64::new(0) })
    }

    /// Waits for all ranks that were asked. A failure of its own is worth more than one that another rank's failure caused.
    fn gather<T>(&self, asked: usize, take: impl FnMut(Reply) -> Result<Option<T>>) -> Result<Vec<T>> {
        let mut results = collect(&self.replies, asked, take);
        if asked < self.commands.len() {
            results.push(Err(Error::Parallel("a rank has ended".into())));
        }
        let caused = |result: &Result<T>| matches!(result, Err(Error::Parallel(_)));
        match results.iter().position(|result| result.is_err() && !caused(result)) {
            Some(first) => Err(results.swap_remove(first).err().unwrap_or_else(ended)),
            None => results.into_iter().collect(),
        }
    }
}

fn ended() -> Error {
    Error::Parallel("a rank has ended".into())
}

/// One reply of each of `asked` ranks, in the order of the ranks.
fn collect<T>(
    replies: &Receiver<(usize, Reply)>,
    asked: usize,
    mut take: impl FnMut(Reply) -> Result<Option<T>>,
) -> Vec<Result<T>> {
    let mut results = Vec::with_capacity(asked);
    while results.len() < asked {
        let Ok((rank, reply)) = replies.recv() else {
            results.push((usize::MAX, Err(ended())));
            break;
        };
        results.push((rank, take(reply).and_then(|value| value.ok_or_else(ended))));
    }
    results.sort_by_key(|(rank, _)| *rank);
    results.into_iter().map(|(_, result)| result).collect()
}

impl CausalLm for TensorParallel {
    fn forward(&self, batch: &Batch, cache: &mut KvCache) -> Result<Tensor> {
        let caches = cache.take_ranks();
        if caches.len() != self.commands.len() {
            return Err(Error::Parallel("the cache went with a rank that has ended".into()));
        }
        let (batch, step) = (Arc::new(batch.clone()), self.step.fetch_add(1, Ordering::Relaxed) + 1);
        let commands = self.commands.iter().zip(caches).map(|(sender, cache)| {
            sender.send(Command::Forward { step, batch: batch.clone(), cache }).is_ok()
        });
        let asked = commands.filter(|sent| *sent).count();
        let mut caches = Vec::with_capacity(asked);
        let results = self.gather(asked, |reply| match reply {
            Reply::Step { logits, cache } => {
                caches.push((cache.rank(), cache));
                logits.map(Some)
            }
            _ => Ok(None),
        });
        caches.sort_by_key(|(rank, _)| *rank);
        cache.put_ranks(caches.into_iter().map(|(_, cache)| cache).collect());
        let first = results?.into_iter().next();
        first.ok_or_else(ended)
    }

    fn device(&self) -> &Device {
        &self.device
    }

    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn new_cache(&self, num_blocks: usize, block_size: usize) -> Result<KvCache> {
        let send =
            |sender: &&Sender<Command>| sender.send(Command::NewCache { num_blocks, block_size }).is_ok();
        let asked = self.commands.iter().filter(send).count();
        let caches = self.gather(asked, |reply| match reply {
            Reply::Cache(cache) => cache.map(Some),
            _ => Ok(None),
        })?;
        Ok(KvCache::of_ranks(caches, num_blocks, block_size))
    }
}

impl Drop for TensorParallel {
    fn drop(&mut self) {
        // Nothing to wait for ends the threads.
        self.commands.clear();
        for thread in self.threads.drain(..) {
            // One that panicked has said so.
            let _ = thread.join();
        }
    }
}

/// Says that its rank's thread has ended, also when it ends by a panic.
struct Replies {
    rank: usize,
    sender: Sender<(usize, Reply)>,
}

impl Replies {
    fn send(&self, reply: Reply) {
        // Nobody listens any more when the model is being dropped.
        let _ = self.sender.send((self.rank, reply));
    }
}

impl Drop for Replies {
    fn drop(&mut self) {
        self.send(Reply::Ended);
    }
}

/// A rank on its thread.
struct Worker {
    place: Place,
    path: PathBuf,
    options: LoadOptions,
    commands: Receiver<Command>,
    replies: Replies,
}

impl Worker {
    fn run(self, connect: Connect) {
        let load = || {
            let communicator = connect(&self.options.device)?;
            load_decoder(&self.path, &self.options, Some((self.place, communicator)))
        };
        let decoder = match guarded(load) {
            Ok(decoder) => decoder,
            Err(error) => return self.replies.send(Reply::Loaded(Err(error))),
        };
        self.replies.send(Reply::Loaded(Ok(Box::new(decoder.info().clone()))));
        while let Ok(command) = self.commands.recv() {
            self.replies.send(match command {
                Command::Forward { step, batch, mut cache } => {
                    let logits = self.step(&decoder, step, &batch, &mut cache);
                    Reply::Step { logits, cache }
                }
                Command::NewCache { num_blocks, block_size } => {
                    let cache = guarded(|| decoder.new_cache(num_blocks, block_size));
                    Reply::Cache(cache.map(|cache| cache.of_rank(self.place.rank)))
                }
            });
        }
    }

    fn step(&self, decoder: &Decoder, step: u64, batch: &Batch, cache: &mut KvCache) -> Result<Tensor> {
        let communicator = decoder.communicator();
        if let Some(communicator) = communicator {
            communicator.begin_step(step);
        }
        let result = guarded(|| decoder.forward(batch, cache));
        if let (Err(error), Some(communicator)) = (&result, communicator) {
            communicator.fail(&error.to_string());
        }
        result
    }
}

/// What `work` gives; a panic is an error like others.
fn guarded<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
        let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
        Err(Error::Parallel(format!("panicked: {}", text.unwrap_or_default())))
    })
}
