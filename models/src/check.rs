//! Models on a device against references that were computed elsewhere: folders with a `reference.json` beside the model,
//! as those under `tests/fixtures`. `ingle check --fixtures` runs it.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use ingle_kernels::check::Checked;
use ingle_kernels::{is_deterministic, set_deterministic};
use serde_json::Value;

use crate::encoder::{EncoderBatch, EncoderOptions, load_encoder};
use crate::error::{Error, Result, invalid};
use crate::json::read_file;
use crate::{Batch, CausalLm, KvCache, LoadOptions, load_causal_lm};

const BLOCK: usize = 16;
const MAX_REFERENCE_BYTES: u64 = 64 << 20;
/// Sequences computed together, to see whether that changes the first.
const BATCHES: [usize; 5] = [1, 2, 3, 8, 32];
/// A fixture whose reference holds for short contexts only.
const SHORT: (&str, usize) = ("phi3_shortrope", 32);

/// Runs all checks of the models in `fixtures` on `device`; `told` hears of each as it ends.
///
/// # Errors
/// If the folder cannot be read. What is wrong with a model is told in its [`Checked::fault`].
pub fn check_models(
    fixtures: &Path,
    device: &Device,
    told: &mut dyn FnMut(&Checked),
) -> Result<Vec<Checked>> {
    let dtypes: &[DType] = if device.is_cpu() { &[DType::F32] } else { &[DType::F32, DType::BF16] };
    let mut done = Vec::new();
    let mut note = |checked: Checked| {
        told(&checked);
        done.push(checked);
    };
    for folder in folders(fixtures)? {
        let name = folder.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let is_encoder = folder.parent().is_some_and(|parent| parent.ends_with("encoders"));
        let kind = if is_encoder { "encoder" } else { "model" };
        if !is_encoder && is_quantised(&folder) {
            let mut checked = Checked {
                name: format!("{kind} {name} as stored"),
                cases: 0,
                worst: 0.0,
                tolerance: ROUNDED,
                fault: None,
            };
            let outcome = generator(&folder, &name, device, None, &mut checked);
            note(ended(checked, outcome));
        }
        for &dtype in dtypes {
            let mut checked = Checked {
                name: format!("{kind} {name} {}", dtype.as_str()),
                cases: 0,
                worst: 0.0,
                tolerance: tolerance(dtype),
                fault: None,
            };
            let outcome = if is_encoder {
                encoder(&folder, device, dtype, &mut checked)
            } else {
                generator(&folder, &name, device, Some(dtype), &mut checked)
            };
            note(ended(checked, outcome));
            // On the CPU a promise to the bit; on a GPU, unless it is asked for, the size of a batch may choose another
            // kernel.
            let modes: &[bool] = if device.is_cpu() { &[true] } else { &[false, true] };
            for &exact in modes.iter().filter(|_| name == "llama") {
                let how = if exact { "to the bit" } else { "nearly" };
                let mut checked = Checked {
                    name: format!("alone and in batches {how} {}", dtype.as_str()),
                    cases: 0,
                    worst: 0.0,
                    tolerance: if exact { 0.0 } else { 1e-2 },
                    fault: None,
                };
                let before = is_deterministic();
                set_deterministic(exact);
                let outcome = batches(&folder, device, dtype, &mut checked);
                set_deterministic(before);
                note(ended(checked, outcome));
            }
        }
    }
    if done.is_empty() {
        return Err(invalid(fixtures, "holds no folder with a reference.json"));
    }
    Ok(done)
}

/// All folders with a reference, generators first.
fn folders(fixtures: &Path) -> Result<Vec<PathBuf>> {
    let mut all = Vec::new();
    for parent in [fixtures.to_owned(), fixtures.join("encoders")] {
        let io = |source| Error::Io { path: parent.clone(), source };
        if parent != fixtures && !parent.is_dir() {
            continue;
        }
        let entries = std::fs::read_dir(&parent).map_err(io)?;
        let mut found: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
        found.retain(|path| path.join("reference.json").is_file());
        found.sort();
        all.extend(found);
    }
    Ok(all)
}

/// Whether the weights in `folder` were quantised before they were saved; references are of what they stand for.
fn is_quantised(folder: &Path) -> bool {
    let config = read_file(&folder.join("config.json"), MAX_REFERENCE_BYTES).unwrap_or_default();
    serde_json::from_slice::<Value>(&config).is_ok_and(|config| config["quantization_config"].is_object())
}

/// Of outputs where activations are rounded to eight bits beside weights that are kept as they are stored.
const ROUNDED: f32 = 1.5e-1;

/// Of a model's outputs, as a share of the largest: sums in another order, or activations rounded to 16 bits.
fn tolerance(dtype: DType) -> f32 {
    if dtype == DType::F32 { 1e-3 } else { 6e-2 }
}

fn ended(mut checked: Checked, outcome: Result<()>) -> Checked {
    if let Err(error) = outcome {
        checked.fault = Some(error.to_string().lines().next().unwrap_or_default().to_owned());
    } else if checked.cases == 0 {
        checked.fault = Some("nothing was checked".to_owned());
    }
    checked
}

fn note(checked: &mut Checked, off: f32, what: impl FnOnce() -> String) {
    checked.cases += 1;
    let off = if off.is_nan() { f32::INFINITY } else { off };
    if off > checked.worst {
        checked.worst = off;
        checked.fault = (off > checked.tolerance).then(what);
    }
}

/// Every prompt's last logits, and that each token of the reference's answer is the likeliest, or as good as.
fn generator(
    folder: &Path,
    name: &str,
    device: &Device,
    dtype: Option<DType>,
    checked: &mut Checked,
) -> Result<()> {
    let max_model_len = (name == SHORT.0).then_some(SHORT.1);
    let model = load(folder, device, dtype, max_model_len)?;
    for (idx, prompt) in list(&reference(folder)?, "prompts").iter().enumerate() {
        let (ids, greedy) = (ids(prompt, "input_ids"), ids(prompt, "greedy"));
        let wanted = floats(prompt, "last_logits");
        let mut run = Run::new(&*model, 1, ids.len() + greedy.len())?;
        run.seqs[0].tokens = ids;
        let mut row = run.step()?.remove(0);
        note(checked, distance(&row, &wanted), || format!("last logits of prompt {idx}"));
        let largest = largest(&wanted);
        for (place, token) in greedy.into_iter().enumerate() {
            let best = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let chosen = row.get(token as usize).copied().unwrap_or(f32::NAN);
            note(checked, (best - chosen) / largest, || format!("token {place} of answer {idx}"));
            run.seqs[0].tokens.push(token);
            row = run.step()?.remove(0);
        }
    }
    Ok(())
}

/// One sequence alone and among others.
fn batches(folder: &Path, device: &Device, dtype: DType, checked: &mut Checked) -> Result<()> {
    const STEPS: usize = 6;
    let model = load(folder, device, Some(dtype), None)?;
    let reference = reference(folder)?;
    let prompts: Vec<Vec<u32>> = list(&reference, "prompts")
        .iter()
        .map(|p| ids(p, "input_ids"))
        .filter(|ids| !ids.is_empty())
        .collect();
    if prompts.is_empty() {
        return Ok(());
    }
    let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
    let mut alone: Vec<Vec<f32>> = Vec::new();
    for size in BATCHES {
        let mut run = Run::new(&*model, size, longest + STEPS)?;
        for (idx, seq) in run.seqs.iter_mut().enumerate() {
            // The first is the longest; the others begin elsewhere in one of the prompts.
            let prompt = &prompts[(prompts.len() - 1 + idx) % prompts.len()];
            seq.tokens = prompt[idx % prompt.len()..].to_vec();
        }
        for step in 0..STEPS {
            let rows = run.step()?;
            if size == 1 {
                alone.push(rows[0].clone());
            } else {
                note(checked, distance(&rows[0], &alone[step]), || format!("{size} together, step {step}"));
            }
            for (seq, row) in run.seqs.iter_mut().zip(rows) {
                let best = row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1).then(b.0.cmp(&a.0)));
                seq.tokens.push(best.map_or(0, |(id, _)| id as u32));
            }
        }
    }
    Ok(())
}

fn encoder(folder: &Path, device: &Device, dtype: DType, checked: &mut Checked) -> Result<()> {
    let options = EncoderOptions { dtype: Some(dtype), device: device.clone(), ..EncoderOptions::default() };
    let mut model = load_encoder(folder, options)?;
    let reference = reference(folder)?;
    let records = list(&reference, "records");
    let mut all = EncoderBatch { cu_seqlens: vec![0], ..EncoderBatch::default() };
    let mut wanted = Vec::new();
    for record in records {
        all.input_ids.extend(ids(record, "input_ids"));
        all.token_type_ids.extend(ids(record, "token_type_ids"));
        all.cu_seqlens.push(all.input_ids.len() as u32);
        wanted.push(floats(record, "output"));
    }
    let width = model.info().dimensions.max(1);
    for (idx, (row, wanted)) in model.forward(&all)?.chunks(width).zip(&wanted).enumerate() {
        note(checked, distance(row, wanted), || format!("text {idx}"));
    }
    Ok(())
}

fn load(
    folder: &Path,
    device: &Device,
    dtype: Option<DType>,
    max_model_len: Option<usize>,
) -> Result<Box<dyn CausalLm>> {
    let options = LoadOptions { dtype, device: device.clone(), max_model_len, ..LoadOptions::default() };
    load_causal_lm(folder, &options)
}

/// Sequences in a cache of their own.
struct Run<'a> {
    model: &'a dyn CausalLm,
    cache: KvCache,
    seqs: Vec<Seq>,
    blocks_each: usize,
}

#[derive(Clone, Default)]
struct Seq {
    tokens: Vec<u32>,
    cached: usize,
}

impl<'a> Run<'a> {
    fn new(model: &'a dyn CausalLm, count: usize, longest: usize) -> Result<Self> {
        let blocks_each = longest.div_ceil(BLOCK).max(1);
        let cache = model.new_cache(blocks_each * count, BLOCK)?;
        Ok(Self { model, cache, seqs: vec![Seq::default(); count], blocks_each })
    }

    /// Computes the tokens that are not cached yet; the logits after each sequence's last.
    fn step(&mut self) -> Result<Vec<Vec<f32>>> {
        let mut batch = Batch::default();
        let meta = &mut batch.meta;
        meta.block_size = BLOCK;
        meta.cu_seqlens_q.push(0);
        meta.cu_blocks.push(0);
        for (idx, seq) in self.seqs.iter_mut().enumerate() {
            // From the last block down, so that no table is an ordinary range.
            let block = |at: usize| ((idx + 1) * self.blocks_each - 1 - at) as u32;
            for position in seq.cached..seq.tokens.len() {
                meta.positions.push(position as u32);
                meta.slot_mapping.push(block(position / BLOCK) * BLOCK as u32 + (position % BLOCK) as u32);
            }
            batch.input_ids.extend(&seq.tokens[seq.cached..]);
            seq.cached = seq.tokens.len();
            meta.cu_seqlens_q.push(batch.input_ids.len() as u32);
            meta.seq_lens.push(seq.tokens.len() as u32);
            meta.block_tables.extend((0..seq.tokens.len().div_ceil(BLOCK)).map(block));
            meta.cu_blocks.push(meta.block_tables.len() as u32);
            batch.logit_rows.push((batch.input_ids.len() as u32).saturating_sub(1));
        }
        let logits = self.model.forward(&batch, &mut self.cache)?;
        Ok(logits.to_dtype(DType::F32)?.to_vec2()?)
    }
}

fn reference(folder: &Path) -> Result<Value> {
    let path = folder.join("reference.json");
    let bytes = read_file(&path, MAX_REFERENCE_BYTES)?;
    serde_json::from_slice(&bytes).map_err(|error| invalid(&path, error.to_string()))
}

fn list<'a>(value: &'a Value, name: &str) -> &'a [Value] {
    value[name].as_array().map_or(&[], Vec::as_slice)
}

fn ids(value: &Value, name: &str) -> Vec<u32> {
    let id = |id: &Value| id.as_u64().and_then(|id| u32::try_from(id).ok()).unwrap_or(u32::MAX);
    list(value, name).iter().map(id).collect()
}

fn floats(value: &Value, name: &str) -> Vec<f32> {
    list(value, name).iter().map(|x| x.as_f64().map_or(f32::NAN, |x| x as f32)).collect()
}

fn largest(values: &[f32]) -> f32 {
    values.iter().fold(1e-3, |max, x| max.max(x.abs()))
}

/// Largest difference, as a share of the largest wanted value; infinite for NaN and other lengths.
fn distance(found: &[f32], wanted: &[f32]) -> f32 {
    if found.len() != wanted.len() {
        return f32::INFINITY;
    }
    let off = |(a, b): (&f32, &f32)| if (a - b).is_finite() { (a - b).abs() } else { f32::INFINITY };
    found.iter().zip(wanted).map(off).fold(0.0, f32::max) / largest(wanted)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fixtures() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures")
    }

    #[test]
    fn the_fixtures_are_right_on_this_machine() {
        let mut lines = 0;
        let done = check_models(&fixtures(), &Device::Cpu, &mut |_| lines += 1).expect("fixtures");
        let wrong: Vec<String> =
            done.iter().filter(|checked| !checked.passed()).map(ToString::to_string).collect();
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
        assert!(done.len() > 35 && lines == done.len(), "{} checks", done.len());
        let stored: Vec<_> = done.iter().filter(|checked| checked.name.ends_with("as stored")).collect();
        assert!(stored.len() >= 9 && stored.iter().all(|checked| checked.worst > 0.0), "{stored:?}");
        let together = done.iter().find(|checked| checked.name.starts_with("alone and in batches"));
        assert!(together.is_some_and(|checked| checked.worst == 0.0 && checked.cases == 24), "{together:?}");
    }

    #[test]
    fn a_wrong_reference_is_seen() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let model = dir.path().join("llama");
        std::fs::create_dir(&model).expect("a folder");
        for name in ["config.json", "model.safetensors", "reference.json"] {
            std::fs::copy(fixtures().join("llama").join(name), model.join(name)).expect("copied");
        }
        let passes = || check_models(dir.path(), &Device::Cpu, &mut |_| {}).expect("checks")[0].passed();
        assert!(passes());
        let reference = reference(&model).expect("a reference");
        let spoil = |pointer: &str, value: Value| {
            let mut wrong = reference.clone();
            *wrong.pointer_mut(pointer).expect("a place") = value;
            std::fs::write(model.join("reference.json"), wrong.to_string()).expect("written");
            assert!(!passes(), "{pointer}");
        };
        spoil("/prompts/1/last_logits/3", 100.0.into());
        spoil("/prompts/2/greedy/5", 0.into());
        spoil("/prompts", Value::Array(Vec::new()));
        std::fs::write(model.join("reference.json"), "null").expect("written");
        assert!(!passes());
        std::fs::remove_file(model.join("reference.json")).expect("removed");
        assert!(check_models(dir.path(), &Device::Cpu, &mut |_| {}).is_err());
    }
}
