use std::cell::Cell;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use ingle_kernels::{Weight, ops};

use super::group::{Connect, TensorParallel};
use super::threads::ThreadCommunicator;
use super::{Communicator, Place, ShardedSource, Shards};
use crate::causal_lm::{CausalLm, LoadOptions};
use crate::error::{Error, Result};
use crate::json::{ConfigJson, read_object};
use crate::layout::ModelSpec;
use crate::prequant::{QuantisedSource, Scheme};
use crate::registry::decoder_config;
use crate::source::TensorSource;
use crate::weights::FolderSource;
use crate::{Batch, KvCache, load_causal_lm};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures").join(name)
}

/// What each rank of a group gets from `work`, all at once.
fn on_all<T: Send>(world_size: usize, work: impl Fn(ThreadCommunicator) -> T + Sync) -> Vec<T> {
    std::thread::scope(|scope| {
        let group = ThreadCommunicator::group(world_size).into_iter();
        let threads: Vec<_> = group.map(|rank| scope.spawn(|| work(rank))).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    })
}

#[test]
fn ranks_add_in_their_order_and_agree_to_the_bit() {
    // Their sum depends on the order: in f32, 1e8 + 1 is 1e8.
    let values = [1.0_f32, 1e8, -1e8, 3.0];
    let want = values.iter().copied().reduce(|sum, x| sum + x).expect("values");
    let results = on_all(4, |communicator| {
        let own = Tensor::new(&[values[communicator.rank()], 2.0], &Device::Cpu).expect("a tensor");
        let sum = communicator.all_reduce_sum(&own).expect("a sum").to_vec1::<f32>().expect("f32");
        let parts = communicator.all_gather(&own).expect("parts");
        (sum, parts.iter().map(|part| part.to_vec1::<f32>().expect("f32")[0]).collect::<Vec<_>>())
    });
    for (sum, parts) in results {
        assert_eq!(sum, [want, 8.0]);
        assert_eq!(parts, values);
    }
}

#[test]
fn a_rank_that_fails_or_ends_is_not_waited_for() {
    let results = on_all(3, |communicator| {
        communicator.begin_step(1);
        let x = Tensor::zeros(2, DType::F32, &Device::Cpu).expect("a tensor");
        if communicator.rank() == 1 {
            communicator.fail("out of memory");
        } else {
            let error = communicator.all_reduce_sum(&x).expect_err("rank 1 failed").to_string();
            assert!(error.contains("rank 1 failed: out of memory"), "{error}");
        }
        // The next step takes nothing for its own that the failed one has left.
        communicator.begin_step(2);
        let one = Tensor::ones(2, DType::F32, &Device::Cpu).expect("a tensor");
        let sum = communicator.all_reduce_sum(&one).expect("a sum").to_vec1::<f32>().expect("f32");
        communicator.begin_step(3);
        if communicator.rank() == 2 {
            return (sum, String::new());
        }
        (sum, communicator.all_reduce_sum(&one).expect_err("rank 2 has ended").to_string())
    });
    for (rank, (sum, error)) in results.into_iter().enumerate() {
        assert_eq!(sum, [3.0; 2]);
        assert!(rank == 2 || error.contains("has ended"), "rank {rank}: {error}");
    }
}

fn shards(name: &str, rank: usize, world_size: usize) -> Result<Shards> {
    let path = fixture(name).join("config.json");
    let object = read_object(&path)?;
    let json = ConfigJson::new(&path, &object);
    let mut config = decoder_config(&json)?;
    let source = FolderSource::open(&fixture(name))?;
    let spec = ModelSpec::new(&config, &source);
    Shards::new(&mut config, &spec, Place { rank, world_size }, &json)
}

#[test]
fn what_cannot_be_divided_is_refused() {
    let refused = |name: &str, world_size: usize, part: &str| {
        let message = shards(name, 0, world_size).expect_err("must be refused").to_string();
        assert!(message.contains(part) && message.contains(&format!("over {world_size} ranks")), "{message}");
    };
    refused("llama", 3, "4 attention heads");
    refused("llama", 8, "4 attention heads");
    assert_eq!(shards("llama", 3, 4).expect("divides").kv_replicas, 2);
    assert_eq!(shards("llama", 1, 2).expect("divides").kv_replicas, 1);
    let options = LoadOptions { tensor_parallel_size: 3, ..LoadOptions::default() };
    let error = load_causal_lm(&fixture("llama"), &options).err().expect("must be refused").to_string();
    assert!(error.contains("4 attention heads cannot be divided over 3 ranks"), "{error}");
}

#[test]
#[allow(clippy::single_range_in_vec_init, reason = "lists of ranges, some with one")]
fn only_the_bytes_of_a_part_are_read() {
    let source = FolderSource::open(&fixture("llama")).expect("the fixture");
    let name = "model.layers.1.self_attn.o_proj.weight";
    let whole = source.load(name).expect("a tensor").to_dtype(DType::F32).expect("f32");
    for (dim, ranges) in [(0, vec![3..7]), (1, vec![16..48]), (1, vec![0..1, 5..9]), (0, vec![60..64, 0..2])]
    {
        let part = source.load_part(name, dim, &ranges).expect("a part").to_dtype(DType::F32).expect("f32");
        let want: Vec<_> =
            ranges.iter().map(|range| whole.narrow(dim, range.start, range.len()).expect("within")).collect();
        let want = Tensor::cat(&want, dim).expect("parts");
        assert_eq!(
            part.to_vec2::<f32>().expect("f32"),
            want.to_vec2::<f32>().expect("f32"),
            "{dim} {ranges:?}"
        );
    }
    assert!(source.load_part(name, 0, &[60..65]).is_err());
    assert!(source.load_part(name, 2, &[0..1]).is_err());
}

#[test]
fn each_rank_keeps_its_part_of_e4m3_numbers() {
    // Scales of blocks: columns belong together by 32, and a quarter of the MLP's 192 is no whole number of those.
    for (fixture_name, world_size, kept) in [
        ("llama_fp8_channel", 2, 4),
        ("llama_fp8_channel", 4, 4),
        ("qwen3_fp8_block", 2, 4),
        ("qwen3_fp8_block", 4, 3),
    ] {
        let path = fixture(fixture_name).join("config.json");
        let object = read_object(&path).expect("a config");
        let scheme = Scheme::read(&ConfigJson::new(&path, &object)).expect("known").expect("quantised");
        let open = || QuantisedSource::open(&fixture(fixture_name), &scheme).expect("the fixture");
        let mut seen = 0;
        for name in ["self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"] {
            let name = format!("model.layers.1.{name}.weight");
            for rank in 0..world_size {
                let shards = shards(fixture_name, rank, world_size).expect("divides");
                let source = ShardedSource::new(Box::new(open()), shards);
                if source.fp8_step(&name).is_none() {
                    continue;
                }
                seen += 1;
                let part = source.load_fp8(&name).expect("a part");
                assert_eq!([part.rows, part.cols], source.shape(&name).expect("a shape"));
                // What the codes stand for is what the rank would read dequantised.
                let all: Vec<u32> = (0..part.rows as u32).collect();
                let weight = Weight::from_fp8(&[part], &Device::Cpu).expect("a weight");
                let have =
                    ops::embedding(&all, &weight, DType::F32).and_then(|have| Ok(have.to_vec2::<f32>()?));
                let want = source.load(&name).and_then(|want| Ok(want.to_vec2::<f32>()?)).expect("a part");
                for (have, want) in have.expect("rows").iter().flatten().zip(want.iter().flatten()) {
                    // In bf16 here, or in f16 whose least numbers are coarse; factors are in f16.
                    assert!(
                        (have - want).abs() <= want.abs() / 200.0 + 1e-7,
                        "{name} of rank {rank}: {have}, {want}"
                    );
                }
            }
        }
        assert_eq!(seen, world_size * kept, "{fixture_name} on {world_size} ranks");
    }
}

/// Fails in one exchange of one step.
struct Faulty {
    inner: ThreadCommunicator,
    fault: Fault,
    step: Cell<u64>,
    exchanges: Cell<usize>,
}

#[derive(Clone, Copy)]
struct Fault {
    step: u64,
    exchange: usize,
    panics: bool,
}

impl Communicator for Faulty {
    fn rank(&self) -> usize {
        self.inner.rank()
    }

    fn world_size(&self) -> usize {
        self.inner.world_size()
    }

    fn all_reduce_sum(&self, x: &Tensor) -> Result<Tensor> {
        self.exchanges.set(self.exchanges.get() + 1);
        if (self.step.get(), self.exchanges.get()) == (self.fault.step, self.fault.exchange) {
            assert!(!self.fault.panics, "a fault of the test");
            return Err(Error::Batch("a fault of the test".into()));
        }
        self.inner.all_reduce_sum(x)
    }

    fn all_gather(&self, x: &Tensor) -> Result<Vec<Tensor>> {
        self.inner.all_gather(x)
    }

    fn begin_step(&self, step: u64) {
        self.step.set(step);
        self.exchanges.set(0);
        self.inner.begin_step(step);
    }

    fn fail(&self, why: &str) {
        self.inner.fail(why);
    }
}

fn logits(model: &dyn CausalLm, cache: &mut KvCache) -> Result<Vec<Vec<f32>>> {
    let mut batch = Batch { input_ids: vec![1, 7, 300], logit_rows: vec![0, 1, 2], ..Batch::default() };
    batch.meta.positions = vec![0, 1, 2];
    batch.meta.slot_mapping = vec![0, 1, 2];
    batch.meta.cu_seqlens_q = vec![0, 3];
    batch.meta.seq_lens = vec![3];
    batch.meta.block_tables = vec![0];
    batch.meta.cu_blocks = vec![0, 1];
    batch.meta.block_size = 4;
    Ok(model.forward(&batch, cache)?.to_vec2()?)
}

#[test]
fn a_fault_of_one_rank_ends_its_step_for_all_and_no_other() {
    for (rank, exchange, panics) in [(0, 1, false), (1, 1, false), (2, 3, false), (1, 5, true), (0, 2, true)]
    {
        let fault = Fault { step: 2, exchange, panics };
        let connect = |inner: ThreadCommunicator| -> Connect {
            let fault = if inner.rank() == rank { fault } else { Fault { step: 0, ..fault } };
            Box::new(move |_| {
                Ok(Box::new(Faulty { inner, fault, step: Cell::new(0), exchanges: Cell::new(0) }))
            })
        };
        // Four ranks, so that the two key/value heads are held twice.
        let connections: Vec<_> = ThreadCommunicator::group(4).into_iter().map(connect).collect();
        let options = LoadOptions { dtype: Some(DType::F32), ..LoadOptions::default() };
        let devices = vec![Device::Cpu; 4];
        let model = TensorParallel::spawn(&fixture("llama"), &options, devices, connections).expect("loads");
        let mut cache = model.new_cache(2, 4).expect("a cache");
        let good = logits(&model, &mut cache).expect("the first step");
        let error = logits(&model, &mut cache).expect_err("the second step").to_string();
        assert!(error.contains("a fault of the test"), "{error}");
        assert_eq!(logits(&model, &mut cache).expect("the third step"), good);
    }
}
