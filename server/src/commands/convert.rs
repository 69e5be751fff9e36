//! `ingle convert`: a GGUF file as a safetensors folder.

use std::io::Write;

use anyhow::bail;
use ingle_engine::{ConvertDtype, ConvertOptions};

use super::load::progress_bar;
use crate::cli::{ConvertArgs, FloatType};

/// Converts and says what was written.
///
/// # Errors
/// One sentence that names the file at fault.
pub fn convert(args: &ConvertArgs) -> anyhow::Result<()> {
    if !args.gguf.is_file() {
        bail!("{}: no such file", args.gguf.display());
    }
    let dtype = match args.dtype {
        FloatType::Auto | FloatType::Bf16 => ConvertDtype::Bf16,
        FloatType::F32 => ConvertDtype::F32,
        FloatType::F16 => ConvertDtype::F16,
    };
    let bar = progress_bar("Converting", "tensors");
    let options = ConvertOptions { dtype, overwrite: args.overwrite };
    let report = ingle_engine::convert(&args.gguf, &args.out_dir, options, &mut |progress| {
        bar.set_length(progress.total as u64);
        bar.set_position(progress.done as u64);
    })?;
    bar.finish_and_clear();
    writeln!(
        std::io::stdout(),
        "{}: {} with {} tensors, {:.1} M parameters, {:.0} MiB",
        args.out_dir.display(),
        report.architecture,
        report.num_tensors,
        report.num_parameters as f64 / 1e6,
        report.num_bytes as f64 / (1 << 20) as f64,
    )?;
    Ok(())
}
