//! Conversion of small files, read back with the safetensors library.

use std::collections::BTreeMap;

use candle_core::Device;

use ingle_kernels::PagedMeta;

use super::*;
use crate::gguf::writer::tiny;
use crate::{Batch, LoadOptions, load_causal_lm};

fn options(dtype: ConvertDtype) -> ConvertOptions {
    ConvertOptions { dtype, overwrite: false }
}

fn read(path: &Path) -> BTreeMap<String, Tensor> {
    candle_core::safetensors::load(path, &Device::Cpu).expect("safetensors").into_iter().collect()
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.to_dtype(DType::F32).and_then(|t| t.flatten_all()?.to_vec1()).expect("values")
}

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).expect("folder");
    let mut names: Vec<_> =
        entries.map(|e| e.expect("entry").file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

const FILES: [&str; 5] =
    ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"];

#[test]
fn writes_a_folder_with_equal_weights() {
    for (dtype, name) in
        [(ConvertDtype::F32, "float32"), (ConvertDtype::Bf16, "bfloat16"), (ConvertDtype::F16, "float16")]
    {
        let dir = tempfile::tempdir().expect("temporary folder");
        let gguf = tiny("llama").write_to(dir.path());
        let out = dir.path().join("a/b");
        let mut seen = Vec::new();
        let report = convert(&gguf, &out, options(dtype), &mut |p| seen.push(p)).expect("converts");
        assert_eq!(names(&out), FILES);
        assert_eq!(report.architecture, "LlamaForCausalLM");
        assert_eq!(report.files.last(), Some(&out.join("config.json")));
        let on_disk: u64 = report.files.iter().map(|f| f.metadata().expect("file").len()).sum();
        assert_eq!(report.num_bytes, on_disk);

        let source = gguf::open(&gguf).expect("opens").source;
        let written = read(&out.join("model.safetensors"));
        assert_eq!(written.keys().map(String::as_str).collect::<Vec<_>>(), source.names());
        assert_eq!(written.len(), report.num_tensors);
        assert_eq!(written.values().map(Tensor::elem_count).sum::<usize>() as u64, report.num_parameters);
        for (key, tensor) in &written {
            // Multiples of 1/8 up to 65 fit every type but bf16, where they round.
            let expected = source.load(key).and_then(|t| Ok(t.to_dtype(tensor.dtype())?)).expect("loads");
            assert_eq!(tensor.dims(), expected.dims());
            assert_eq!(values(tensor), values(&expected), "{key} {name}");
        }
        let config: Json =
            serde_json::from_slice(&fs::read(out.join("config.json")).expect("config")).expect("json");
        assert_eq!(config["torch_dtype"], name);

        assert_eq!(seen.len(), report.num_tensors);
        let last = seen.last().expect("progress");
        assert_eq!((last.done, last.bytes_done), (last.total, last.bytes_total));
    }
}

/// The logits of four tokens.
fn logits(path: &Path) -> Vec<f32> {
    let options = LoadOptions { dtype: Some(DType::F32), ..LoadOptions::default() };
    let model = load_causal_lm(path, &options).expect("loads");
    let mut cache = model.new_cache(1, 4).expect("cache");
    let meta = PagedMeta {
        positions: vec![0, 1, 2, 3],
        slot_mapping: vec![0, 1, 2, 3],
        block_tables: vec![0],
        cu_blocks: vec![0, 1],
        cu_seqlens_q: vec![0, 4],
        seq_lens: vec![4],
        block_size: 4,
    };
    let batch = Batch { input_ids: vec![3, 9, 1, 13], meta, logit_rows: vec![0, 1, 2, 3] };
    values(&model.forward(&batch, &mut cache).expect("computes"))
}

#[test]
fn the_gguf_file_and_the_folder_are_one_model() {
    for architecture in ["llama", "qwen2", "qwen3"] {
        let dir = tempfile::tempdir().expect("temporary folder");
        let gguf = tiny(architecture).write_to(dir.path());
        let out = dir.path().join("out");
        convert(&gguf, &out, options(ConvertDtype::F32), &mut |_| {}).expect("converts");
        let direct = logits(&gguf);
        assert!(direct.iter().all(|x| x.is_finite()) && direct.iter().any(|x| *x != direct[0]));
        assert_eq!(direct, logits(&out), "{architecture}");
    }
}

#[test]
fn an_existing_model_is_kept_unless_told_otherwise() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let gguf = tiny("llama").write_to(dir.path());
    let out = dir.path().join("out");
    fs::create_dir(&out).expect("folder");
    fs::write(out.join("model-00001-of-00002.safetensors"), "old").expect("file");
    fs::write(out.join("model.safetensors.index.json"), "old").expect("file");
    fs::write(out.join("notes.txt"), "mine").expect("file");
    let error = convert(&gguf, &out, options(ConvertDtype::F32), &mut |_| {}).expect_err("refused");
    assert!(error.to_string().contains("already holds a model"));
    assert_eq!(names(&out).len(), 3);

    let overwrite = ConvertOptions { overwrite: true, ..options(ConvertDtype::F32) };
    convert(&gguf, &out, overwrite, &mut |_| {}).expect("converts");
    assert_eq!(names(&out), [&FILES[..3], &["notes.txt"], &FILES[3..]].concat());
    convert(&gguf, &out, overwrite, &mut |_| {}).expect("converts again");
}

#[test]
fn a_bad_file_leaves_the_folder_alone() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let mut bad = tiny("llama");
    bad.text("tokenizer.ggml.pre", "unheard-of");
    let gguf = bad.write_to(dir.path());
    let out = dir.path().join("out");
    convert(&gguf, &out, options(ConvertDtype::F32), &mut |_| {}).expect_err("refused");
    assert!(!out.exists());
}

#[test]
fn a_value_that_does_not_fit_ends_the_conversion_without_a_model() {
    let dir = tempfile::tempdir().expect("temporary folder");
    for (value, dtype) in
        [(70_000.0f32, ConvertDtype::F16), (f32::NAN, ConvertDtype::F32), (f32::INFINITY, ConvertDtype::Bf16)]
    {
        let mut w = tiny("llama");
        let end = w.data.len();
        w.data[end - 4..].copy_from_slice(&value.to_le_bytes());
        let gguf = w.write_to(dir.path());
        let out = dir.path().join("out");
        let error = convert(&gguf, &out, options(dtype), &mut |_| {}).expect_err("refused").to_string();
        assert!(error.contains("down_proj") && error.contains("no finite"), "{error}");
        assert!(names(&out).is_empty(), "left behind: {:?}", names(&out));
    }
}

#[test]
fn large_models_are_written_in_shards() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let source = gguf::open(&tiny("llama").write_to(dir.path())).expect("opens").source;
    let max = 600;
    let shards = plan_shards(&source, ConvertDtype::F32, max).expect("plan");
    assert!(shards.len() > 2);
    assert!(shards.iter().all(|s| s.num_bytes <= max || s.tensors.len() == 1));
    let planned: Vec<_> = shards.iter().flat_map(|s| s.tensors.iter().map(|t| t.name.as_str())).collect();
    assert_eq!(planned, source.names());
    assert_eq!(shards[0].file, format!("model-00001-of-{:05}.safetensors", shards.len()));

    let mut writer = FolderWriter { dir: dir.path(), files: Vec::new(), num_bytes: 0 };
    let mut tell = |_| {};
    let mut progress = Progress::new(&shards, &mut tell);
    let index = index_json(&shards);
    for shard in &shards {
        writer
            .write(&shard.file, |out| write_shard(out, shard, &source, ConvertDtype::F32, &mut progress))
            .expect("writes");
        for (name, tensor) in read(&dir.path().join(&shard.file)) {
            assert_eq!(index["weight_map"][&name], shard.file);
            assert_eq!(values(&tensor), values(&source.load(&name).expect("loads")));
        }
    }
    assert_eq!(index["metadata"]["total_size"], progress.bytes_done);
}
