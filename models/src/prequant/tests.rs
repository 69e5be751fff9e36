use std::path::Path;

use candle_core::{DType, Device};
use half::f16;
use ingle_kernels::{BlockType, QuantizedBlocks, Weight, ops};
use serde_json::{Value, json};

use super::fp8::{self, ScaleOf, e4m3};
use super::grouped::{Grouped, Packing};
use super::scheme::{Awq, Fp8, Gptq, Scheme};
use super::source::QuantisedSource;
use crate::json::{ConfigJson, read_object};
use crate::source::TensorSource;

/// What `quantization_config` says, or the message that refuses it.
fn read(config: Value) -> Result<Scheme, String> {
    let config = json!({ "quantization_config": config });
    let Value::Object(object) = config else { unreachable!("an object") };
    let scheme = Scheme::read(&ConfigJson::new(Path::new("config.json"), &object));
    scheme.map(|scheme| scheme.expect("there is one")).map_err(|error| error.to_string())
}

#[test]
fn configs_of_checkpoints_in_use_are_read() {
    let gptq = |bits, group_size, symmetric, zeros_minus_one| {
        Ok(Scheme::Gptq(Gptq { bits, group_size, symmetric, zeros_minus_one }))
    };
    let read_gptq = |more: Value| {
        let mut config = json!({"quant_method": "gptq", "bits": 4, "group_size": 128});
        for (key, value) in more.as_object().expect("an object") {
            config[key] = value.clone();
        }
        read(config)
    };
    assert_eq!(read_gptq(json!({})), gptq(4, Some(128), true, true));
    assert_eq!(
        read_gptq(json!({"group_size": -1, "sym": false, "desc_act": true})),
        gptq(4, None, false, true)
    );
    assert_eq!(
        read_gptq(json!({"bits": 8, "group_size": 32, "checkpoint_format": "gptq_v2", "dynamic": {}})),
        gptq(8, Some(32), true, false)
    );
    let awq = Ok(Scheme::Awq(Awq { group_size: Some(64) }));
    assert_eq!(read(json!({"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm"})), awq);
    assert_eq!(read(json!({"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "version": "GEMM"})), awq);
    let fp8 = |block, activation_scales| Ok(Scheme::Fp8(Fp8 { block, activation_scales }));
    assert_eq!(read(json!({"quant_method": "fp8"})), fp8(None, false));
    assert_eq!(
        read(json!({"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 64]})),
        fp8(Some((128, 64)), false)
    );
    let compressed = |strategy: &str, structure: Value| {
        let weights =
            json!({"num_bits": 8, "type": "float", "strategy": strategy, "block_structure": structure});
        let group = json!({"weights": weights, "input_activations": {"dynamic": false}});
        read(json!({"quant_method": "compressed-tensors", "format": "float-quantized",
            "config_groups": {"group_0": group}}))
    };
    assert_eq!(compressed("tensor", Value::Null), fp8(None, true));
    assert_eq!(compressed("block", json!([128, 128])), fp8(Some((128, 128)), true));
    assert_eq!(compressed("block", json!("128x64")), fp8(Some((128, 64)), true));
}

#[test]
fn what_is_not_supported_is_named() {
    let compressed = |format: &str, weights: Value| {
        json!({"quant_method": "compressed-tensors", "format": format,
            "config_groups": {"group_0": {"weights": weights}}})
    };
    let cases = [
        (json!({"quant_method": "bitsandbytes"}), "\"bitsandbytes\" are not supported; known are: awq"),
        (json!({}), "unnamed method"),
        (json!({"quant_method": "gptq", "bits": 3, "group_size": 128}), "GPTQ of 3 bits"),
        (json!({"quant_method": "gptq", "group_size": 128}), "bits is missing"),
        (json!({"quant_method": "gptq", "bits": 4}), "group_size is missing"),
        (json!({"quant_method": "gptq", "bits": 4, "group_size": 0}), "multiple of 32"),
        (json!({"quant_method": "gptq", "bits": 4, "group_size": 48}), "not 48"),
        (json!({"quant_method": "gptq", "bits": 4, "group_size": -2}), "not -2"),
        (json!({"quant_method": "gptq", "bits": 4, "group_size": u64::MAX}), "multiple of 32"),
        (
            json!({"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "marlin"}),
            "\"marlin\"",
        ),
        (json!({"quant_method": "gptq", "bits": 4, "group_size": 32, "dynamic": {"-:x": {}}}), "(dynamic)"),
        (json!({"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": "yes"}), "sym must be"),
        (json!({"quant_method": "awq", "bits": 8, "group_size": 32}), "AWQ of 8 bits"),
        (json!({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemv"}), "\"gemv\""),
        (json!({"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": false}), "zero points"),
        (json!({"quant_method": "fp8", "fmt": "e5m2"}), "\"e5m2\""),
        (json!({"quant_method": "fp8", "activation_scheme": "odd"}), "\"odd\""),
        (json!({"quant_method": "fp8", "weight_block_size": [0, 128]}), "two sizes"),
        (json!({"quant_method": "fp8", "weight_block_size": [128]}), "two sizes"),
        (json!({"quant_method": "fp8", "weight_block_size": "axb"}), "two sizes"),
        (compressed("pack-quantized", json!({})), "\"pack-quantized\""),
        (compressed("float-quantized", json!({"num_bits": 4, "type": "int"})), "4 bits of the type \"int\""),
        (
            compressed("float-quantized", json!({"num_bits": 8, "type": "float", "strategy": "group"})),
            "\"group\"",
        ),
        (
            compressed("float-quantized", json!({"num_bits": 8, "type": "float", "symmetric": false})),
            "asymmetric",
        ),
        (
            compressed("float-quantized", json!({"num_bits": 8, "type": "float", "strategy": "block"})),
            "missing",
        ),
        (json!({"quant_method": "compressed-tensors", "format": "float-quantized"}), "config_groups"),
    ];
    for (config, part) in cases {
        let message = read(config.clone()).expect_err("must be refused");
        assert!(message.contains(part) && !message.contains('\n'), "{config}: {message:?} lacks {part:?}");
    }
}

#[test]
fn fp8_codes_are_their_numbers() {
    let known =
        [(0x00, 0.0), (0x01, 1.0 / 512.0), (0x08, 1.0 / 64.0), (0x38, 1.0), (0x3c, 1.5), (0x7e, 448.0)];
    for (code, number) in known {
        assert_eq!((e4m3(code), e4m3(code | 0x80)), (number, -number), "{code:#x}");
    }
    assert!(e4m3(0x7f).is_nan() && e4m3(0xff).is_nan());
    assert!((0..0x7e).all(|code| e4m3(code) < e4m3(code + 1)));
}

#[test]
fn fp8_scales_are_told_apart_by_their_shape() {
    let of = |shape: &[usize], block| ScaleOf::of(shape, (5, 6), block);
    assert_eq!(of(&[], None), Some(ScaleOf::Tensor));
    assert_eq!(of(&[1], Some((2, 4))), Some(ScaleOf::Tensor));
    assert_eq!(of(&[5, 1], None), Some(ScaleOf::Row));
    assert_eq!(of(&[5], None), Some(ScaleOf::Row));
    assert_eq!(of(&[3, 2], Some((2, 4))), Some(ScaleOf::Block(2, 4)));
    assert_eq!(of(&[2, 3], Some((2, 4))), None);
    assert_eq!(of(&[3, 2], None), None);
    assert_eq!(of(&[6], None), None);
    // One code for 1, so that a value is its scale.
    let codes = [0x38; 30];
    let scales = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
    let values = fp8::values(&codes, 6, &scales, ScaleOf::Block(2, 4));
    let want = |row: usize, col: usize| (row / 2 * 2 + col / 4 + 1) as f32;
    let want: Vec<f32> = (0..30).map(|i| want(i / 6, i % 6)).collect();
    assert_eq!(values, want);
    let rows = fp8::values(&codes, 6, &scales, ScaleOf::Row);
    assert_eq!(rows[6..12], [2.0; 6]);
}

/// A matrix of eight outputs and `cols` inputs from codes, `code(row, col)`.
fn matrix(
    packing: Packing,
    bits: u32,
    cols: usize,
    group: usize,
    code: impl Fn(usize, usize) -> u32,
) -> Grouped {
    let (rows, per_word) = (8, (32 / bits) as usize);
    let mut qweight = vec![0u32; rows * cols / per_word];
    for row in 0..rows {
        for col in 0..cols {
            match packing {
                Packing::Inputs => {
                    qweight[col / per_word * rows + row] |=
                        code(row, col) << (col % per_word * bits as usize);
                }
                // Columns of a word from its lowest bits up: 0, 2, 4, 6, 1, 3, 5, 7.
                Packing::Outputs => {
                    let field = if row % 2 == 0 { row / 2 } else { 4 + row / 2 };
                    qweight[col] |= code(row, col) << (4 * field);
                }
            }
        }
    }
    let groups = cols / group;
    Grouped {
        rows,
        cols,
        bits,
        packing,
        qweight,
        zeros: (0..groups * rows).map(|i| (i * 7 % 17) as u16).collect(),
        scales: (0..groups * rows).map(|i| f16::from_f32(0.01 + 0.003 * i as f32).to_f32()).collect(),
        group_of: (0..cols).map(|col| (col / group) as u32).collect(),
    }
}

/// The numbers of Q4_0, Q4_1 and Q8_0 blocks, by the formulas of GGUF.
fn decode(blocks: &QuantizedBlocks) -> Vec<f32> {
    let mut values = Vec::new();
    for block in blocks.bytes.chunks_exact(blocks.block_type.block_bytes()) {
        let number = |at: usize| f16::from_le_bytes([block[at], block[at + 1]]).to_f32();
        let scale = number(0);
        match blocks.block_type {
            BlockType::Q8_0 => values.extend(block[2..].iter().map(|code| scale * f32::from(*code as i8))),
            BlockType::Q4_0 | BlockType::Q4_1 => {
                let (codes, min) = match blocks.block_type {
                    BlockType::Q4_1 => (&block[4..], number(2)),
                    _ => (&block[2..], -8.0 * scale),
                };
                values.extend(codes.iter().map(|both| scale * f32::from(both & 15) + min));
                values.extend(codes.iter().map(|both| scale * f32::from(both >> 4) + min));
            }
        }
    }
    values
}

#[test]
fn codes_of_both_packings_are_found() {
    let code = |row: usize, col: usize| ((3 * row + 5 * col + row * col) % 16) as u32;
    for packing in [Packing::Inputs, Packing::Outputs] {
        let grouped = matrix(packing, 4, 64, 32, code);
        let values = grouped.values();
        for (i, value) in values.iter().enumerate() {
            let (row, col) = (i / 64, i % 64);
            let group = col / 32 * 8 + row;
            let want = grouped.scales[group] * (code(row, col) as f32 - f32::from(grouped.zeros[group]));
            assert_eq!(*value, want, "{packing:?}: row {row}, column {col}");
        }
    }
    // As written out by hand: a word of each format.
    assert_eq!(Grouped::unpack_zeros(&[0x7654_3210], 4, Packing::Inputs, true), [1, 2, 3, 4, 5, 6, 7, 8]);
    assert_eq!(Grouped::unpack_zeros(&[0x7531_6420], 4, Packing::Outputs, false), [0, 1, 2, 3, 4, 5, 6, 7]);
    assert_eq!(Grouped::unpack_zeros(&[0xff80_017f], 8, Packing::Inputs, true), [128, 2, 129, 256]);
}

#[test]
fn blocks_with_minima_are_off_by_a_128th_of_a_step_at_most() {
    let code = |row: usize, col: usize| ((3 * row + 5 * col) % 16) as u32;
    let grouped = matrix(Packing::Outputs, 4, 128, 64, code);
    let blocks = grouped.blocks(BlockType::Q4_1).expect("f16 scales");
    assert_eq!((blocks.rows, blocks.cols, blocks.bytes.len()), (8, 128, 8 * 4 * 20));
    let mut largest = 0.0_f32;
    for (i, (have, want)) in decode(&blocks).iter().zip(grouped.values()).enumerate() {
        let scale = grouped.scales[i % 128 / 64 * 8 + i / 128];
        largest = largest.max((have - want).abs() / scale);
    }
    // Not exact either, or this test would not see a difference.
    assert!(largest > 0.0 && largest <= 1.0 / 128.0, "{largest} steps");
}

#[test]
fn symmetric_codes_become_blocks_exactly() {
    for (bits, block_type) in [(4, BlockType::Q4_0), (8, BlockType::Q8_0)] {
        let mut grouped =
            matrix(Packing::Inputs, bits, 64, 32, |row, col| ((7 * row + 11 * col) % (1 << bits)) as u32);
        assert!(!grouped.is_symmetric());
        grouped.zeros.fill(1 << (bits - 1));
        assert!(grouped.is_symmetric());
        assert_eq!(decode(&grouped.blocks(block_type).expect("f16 scales")), grouped.values());
    }
    let mut grouped = matrix(Packing::Inputs, 4, 64, 32, |_, _| 1);
    grouped.scales[3] = 1e6;
    assert!(grouped.blocks(BlockType::Q4_1).is_none());
}

fn open(name: &str) -> QuantisedSource {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures").join(name);
    let path = folder.join("config.json");
    let object = read_object(&path).expect("a config");
    let scheme = Scheme::read(&ConfigJson::new(&path, &object)).expect("known").expect("quantised");
    QuantisedSource::open(&folder, &scheme).expect("the fixture")
}

#[test]
fn e4m3_numbers_are_kept_as_they_are() {
    // Of seven projections in each of two layers; one checkpoint left one alone.
    for (name, num_kept) in [("llama_fp8", 14), ("llama_fp8_channel", 13), ("qwen3_fp8_block", 14)] {
        let source = open(name);
        let kept: Vec<_> =
            source.names().into_iter().filter(|name| source.fp8_step(name).is_some()).collect();
        assert_eq!(kept.len(), num_kept, "{name}");
        for tensor in kept {
            let matrix = source.load_fp8(tensor).expect("e4m3 numbers");
            assert_eq!(matrix.factors.is_empty(), name != "qwen3_fp8_block", "{name}");
            let all: Vec<u32> = (0..matrix.rows as u32).collect();
            let weight = Weight::from_fp8(&[matrix], &Device::Cpu).expect("a weight");
            let have =
                ops::embedding(&all, &weight, DType::F32).expect("rows").to_vec2::<f32>().expect("f32");
            let want = source.load(tensor).expect("a tensor").to_vec2::<f32>().expect("f32");
            for (have, want) in have.iter().flatten().zip(want.iter().flatten()) {
                // In bf16 here, or in f16 whose least numbers are coarse; factors are in f16.
                assert!((have - want).abs() <= want.abs() / 200.0 + 1e-7, "{name}: {tensor}: {have}, {want}");
            }
        }
        assert!(source.fp8_step("model.embed_tokens.weight").is_none() && source.fp8_step("none").is_none());
        assert!(source.load_fp8("model.norm.weight").is_err());
    }
}

#[test]
fn scales_of_blocks_become_those_of_rows_and_factors() {
    let block = ScaleOf::Block(2, 64);
    assert_eq!((block.step(), ScaleOf::Row.step()), (Some(32), Some(1)));
    assert_eq!(ScaleOf::Block(2, 48).step(), None);
    // Three rows of 100 columns: two blocks down, two across, the last ones smaller.
    let (rows, factors) = block.by_rows(&[0.5, -2.0, 0.0, 0.0], (3, 100));
    assert_eq!(rows, [2.0, 2.0, 0.0]);
    let factors: Vec<f32> = factors.into_iter().map(f16::to_f32).collect();
    assert_eq!(factors, [0.25, 0.25, -1.0, -1.0, 0.25, 0.25, -1.0, -1.0, 1.0, 1.0, 1.0, 1.0]);
    assert!(block.by_rows(&[1.0, f32::NAN, 0.0, 0.0], (3, 100)).0[0].is_nan());
}
