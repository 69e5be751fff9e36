//! `ingle embed`: the embeddings of a file's texts, computed in this process.
//!
//! Texts are read, tokenised and handed to the encoder in groups, so that a file may be larger than memory; the next
//! group is read and tokenised while the last one is computed.

use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, IsTerminal, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use indicatif::{ProgressBar, ProgressStyle};
use ingle_engine::embed::{EncodeRequest, EncoderConfig, EncoderHandle, EncoderInput, EncoderTask};
use serde_json::{Map, Value, json};

use super::load::Find;
use super::load_encoder::{How, load};
use crate::cli::{EmbedArgs, LineFormat, widths};
use crate::text::{Side, Specials, Tokenizer};

/// Texts of a group.
const GROUP: usize = 512;
/// Bytes of a line at most.
const MAX_LINE: u64 = 64 << 20;
/// Bytes of the head of a `.npy` file, padded so that it can be written anew when the number of rows is known.
const NPY_HEAD: usize = 128;

/// Embeds the texts of `args.input` and prints the speed on standard error.
///
/// # Errors
/// One sentence that names what is wrong, with the line.
pub fn embed(args: &EmbedArgs) -> anyhow::Result<()> {
    ingle_engine::set_num_threads(args.threads);
    let how = How {
        find: Find {
            revision: args.revision.clone(),
            token: args.hf_token.clone(),
            cache_dir: args.download_dir.clone(),
            offline: args.offline,
        },
        device: args.device,
        dtype: args.dtype,
        quantization: args.quantization,
    };
    // A wrong path is said before a model is loaded.
    let mut lines = Lines::open(args)?;
    let format = OutputFormat::of(args.output.as_deref())?;
    let loaded = load(&args.model, EncoderTask::Embed, &how)?;
    let info = loaded.encoder.info().clone();
    let terminal = std::io::stderr().is_terminal();
    if terminal {
        // Nobody need listen there.
        let _ = writeln!(std::io::stderr(), "{}", loaded.report.join("\n"));
    }
    let widths = widths(&args.embedding_dimensions, info.matryoshka.as_deref(), info.dimensions);
    let widths = widths.map_err(anyhow::Error::msg)?;
    if let Some(warning) = &loaded.warning {
        let _ = writeln!(std::io::stderr(), "warning: {warning}");
    }
    let dimensions = match args.dimensions {
        None => info.dimensions,
        Some(wanted) if wanted == info.dimensions || widths.contains(&wanted) => wanted,
        Some(wanted) => bail!(
            "--dimensions {wanted}: the model does not say that it was trained to be cut to that; if it was, give \
             --embedding-dimensions {wanted}, too"
        ),
    };
    let prompt = match &args.prompt_name {
        None => info.default_prompt.as_ref().and_then(|name| info.prompts.get(name)).cloned(),
        Some(name) => match info.prompts.get(name) {
            Some(prompt) => Some(prompt.clone()),
            None => bail!("--prompt-name {name}: the model has no such prompt"),
        },
    };
    let reader = Reader {
        name: lines.name.clone(),
        tokenizer: &loaded.tokenizer,
        prompt: prompt.unwrap_or_default(),
        max: info.max_seq_len,
        lower_case: info.lower_case,
        truncate: !args.no_truncate,
    };
    // Long runs of a batch job: nobody waits for a single text.
    let config = EncoderConfig { batch_time: Duration::from_millis(200), ..EncoderConfig::default() };
    let handle = EncoderHandle::spawn(loaded.encoder, config, None)?;
    let mut output = Output::create(args, format, dimensions)?;
    let bar = bar(lines.bytes);
    let begin = Instant::now();
    let mut totals = Totals::default();
    let mut under_way: Option<(Vec<Record>, EncodeRequest)> = None;
    loop {
        let records = lines.group()?;
        let is_last = records.is_empty();
        let next = if is_last { None } else { Some(reader.submit(records, &handle, &mut totals)?) };
        if let Some((records, request)) = under_way.take() {
            let rows = request.blocking_finish().with_context(|| lines.place(&records))?;
            for (record, row) in records.into_iter().zip(rows.rows.chunks_exact(rows.width)) {
                let mut row = row.get(..dimensions).unwrap_or(row).to_vec();
                if info.normalize && dimensions < info.dimensions {
                    crate::http::encode::normalize(&mut row);
                }
                output.write(record, &row)?;
            }
            bar.set_position(lines.read);
        }
        if is_last {
            break;
        }
        under_way = next;
    }
    output.finish()?;
    bar.finish_and_clear();
    totals.print(begin.elapsed(), args.output.as_deref());
    Ok(())
}

/// A line of the input.
struct Record {
    number: usize,
    /// The object it was; `None` for a plain text.
    object: Option<Map<String, Value>>,
    text: String,
}

struct Lines<'a> {
    from: Box<dyn BufRead>,
    field: &'a str,
    format: LineFormat,
    name: String,
    /// Lines and bytes read so far.
    number: usize,
    read: u64,
    /// Bytes of the file, where known.
    bytes: Option<u64>,
}

impl<'a> Lines<'a> {
    fn open(args: &'a EmbedArgs) -> anyhow::Result<Self> {
        let name = args.input.display().to_string();
        let (from, bytes): (Box<dyn BufRead>, _) = if name == "-" {
            (Box::new(BufReader::new(std::io::stdin())), None)
        } else {
            let file = File::open(&args.input).with_context(|| name.clone())?;
            let bytes = file.metadata().ok().filter(|meta| meta.is_file()).map(|meta| meta.len());
            (Box::new(BufReader::new(file)), bytes)
        };
        Ok(Self { from, field: &args.field, format: args.input_format, name, number: 0, read: 0, bytes })
    }

    /// Where `records` stand in the file.
    fn place(&self, records: &[Record]) -> String {
        match (records.first(), records.last()) {
            (Some(first), Some(last)) if first.number < last.number => {
                format!("{}:{}-{}", self.name, first.number, last.number)
            }
            (Some(only), _) => format!("{}:{}", self.name, only.number),
            (None, _) => self.name.clone(),
        }
    }

    /// The next records; none at the end.
    fn group(&mut self) -> anyhow::Result<Vec<Record>> {
        let mut records = Vec::with_capacity(GROUP);
        while records.len() < GROUP {
            let mut line = Vec::new();
            let read = (&mut self.from).take(MAX_LINE).read_until(b'\n', &mut line);
            let read = read.with_context(|| format!("{} cannot be read", self.name))?;
            if read == 0 {
                break;
            }
            self.number += 1;
            self.read += read as u64;
            if read as u64 == MAX_LINE {
                bail!("{}:{}: a line of more than {MAX_LINE} bytes", self.name, self.number);
            }
            let line = String::from_utf8(line)
                .map_err(|_| anyhow::anyhow!("{}:{}: not UTF-8", self.name, self.number))?;
            let line = line.trim_end_matches(['\n', '\r']);
            if self.format == LineFormat::Auto {
                let json = serde_json::from_str::<Value>(line).is_ok_and(|v| v.is_string() || v.is_object());
                self.format = if json { LineFormat::Jsonl } else { LineFormat::Text };
            }
            records.extend(self.record(line)?);
        }
        Ok(records)
    }

    /// An empty line of JSON is none; an empty text is one.
    fn record(&self, line: &str) -> anyhow::Result<Option<Record>> {
        let at = || format!("{}:{}", self.name, self.number);
        let number = self.number;
        if self.format == LineFormat::Text {
            return Ok(Some(Record { number, object: None, text: line.to_owned() }));
        }
        if line.trim().is_empty() {
            return Ok(None);
        }
        let value: Value = serde_json::from_str(line).map_err(|e| anyhow::anyhow!("{}: {e}", at()))?;
        match value {
            Value::String(text) => Ok(Some(Record { number, object: None, text })),
            Value::Object(object) => match object.get(self.field) {
                Some(Value::String(text)) => {
                    let text = text.clone();
                    Ok(Some(Record { number, object: Some(object), text }))
                }
                _ => bail!("{}: the object has no string {:?} (see --field)", at(), self.field),
            },
            _ => bail!("{}: neither a string nor an object", at()),
        }
    }
}

struct Reader<'a> {
    /// Of the file.
    name: String,
    tokenizer: &'a Tokenizer,
    prompt: String,
    max: usize,
    lower_case: bool,
    truncate: bool,
}

impl Reader<'_> {
    fn submit(
        &self,
        records: Vec<Record>,
        handle: &EncoderHandle,
        totals: &mut Totals,
    ) -> anyhow::Result<(Vec<Record>, EncodeRequest)> {
        let mut inputs = Vec::with_capacity(records.len());
        for record in &records {
            let text = format!("{}{}", self.prompt, record.text);
            let text = if self.lower_case { text.to_lowercase() } else { text };
            let ids = self
                .tokenizer
                .encode(&text, Specials::Parse, false)
                .with_context(|| format!("{}:{}", self.name, record.number))?;
            let framed = self.tokenizer.frame().text(&ids, self.max, Side::Right);
            if framed.dropped > 0 && !self.truncate {
                let tokens = framed.ids.len() + framed.dropped;
                bail!(
                    "{}:{}: the text has {tokens} tokens; the model takes {}",
                    self.name,
                    record.number,
                    self.max
                );
            }
            totals.texts += 1;
            totals.tokens += framed.ids.len() as u64;
            totals.cut += u64::from(framed.dropped > 0);
            totals.dropped += framed.dropped as u64;
            inputs.push(EncoderInput { ids: framed.ids, type_ids: framed.types });
        }
        Ok((records, handle.submit(inputs)?))
    }
}

#[derive(Default)]
struct Totals {
    texts: u64,
    tokens: u64,
    cut: u64,
    dropped: u64,
}

impl Totals {
    fn print(&self, took: Duration, output: Option<&Path>) {
        let seconds = took.as_secs_f64().max(1e-9);
        let mut line = format!(
            "{} texts, {} tokens in {seconds:.1} s: {:.1} texts/s, {:.0} tokens/s",
            self.texts,
            self.tokens,
            self.texts as f64 / seconds,
            self.tokens as f64 / seconds
        );
        if self.cut > 0 {
            line.push_str(&format!("; {} texts were too long and lost {} tokens", self.cut, self.dropped));
        }
        if let Some(path) = output {
            line.push_str(&format!("; written to {}", path.display()));
        }
        // Nobody need listen there.
        let _ = writeln!(std::io::stderr(), "{line}");
    }
}

/// How embeddings are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum OutputFormat {
    Jsonl,
    Npy,
}

impl OutputFormat {
    /// What the end of the file's name says; a name without one, such as that of a pipe, is JSONL.
    fn of(path: Option<&Path>) -> anyhow::Result<Self> {
        let Some((path, end)) = path.and_then(|path| Some((path, path.extension()?))) else {
            return Ok(Self::Jsonl);
        };
        match end.to_str() {
            Some("npy") => Ok(Self::Npy),
            Some("jsonl" | "ndjson" | "json") => Ok(Self::Jsonl),
            _ => bail!("--output {}: the file's name must end in .npy or .jsonl", path.display()),
        }
    }
}

/// Where embeddings go.
enum Output {
    Jsonl(Box<dyn Write>),
    Npy { file: BufWriter<File>, rows: u64, width: usize },
}

impl Output {
    fn create(args: &EmbedArgs, format: OutputFormat, width: usize) -> anyhow::Result<Self> {
        let Some(path) = &args.output else {
            return Ok(Self::Jsonl(Box::new(BufWriter::new(std::io::stdout()))));
        };
        let file = File::create(path).with_context(|| path.display().to_string())?;
        let mut file = BufWriter::new(file);
        if format == OutputFormat::Npy {
            file.write_all(&npy_head(0, width))?;
            return Ok(Self::Npy { file, rows: 0, width });
        }
        Ok(Self::Jsonl(Box::new(file)))
    }

    fn write(&mut self, record: Record, row: &[f32]) -> anyhow::Result<()> {
        match self {
            Self::Npy { file, rows, .. } => {
                *rows += 1;
                for number in row {
                    file.write_all(&number.to_le_bytes())?;
                }
            }
            Self::Jsonl(out) => {
                let mut object = record.object.unwrap_or_else(|| {
                    let mut object = Map::new();
                    object.insert("text".to_owned(), Value::String(record.text));
                    object
                });
                object.insert("embedding".to_owned(), json!(row));
                serde_json::to_writer(&mut *out, &object).map_err(std::io::Error::from)?;
                out.write_all(b"\n")?;
            }
        }
        Ok(())
    }

    fn finish(self) -> anyhow::Result<()> {
        match self {
            Self::Jsonl(mut out) => out.flush()?,
            Self::Npy { mut file, rows, width } => {
                file.flush()?;
                file.seek(SeekFrom::Start(0))?;
                file.write_all(&npy_head(rows, width))?;
                file.flush()?;
            }
        }
        Ok(())
    }
}

/// The head of a NumPy file, format 1.0, of a `[rows, width]` little-endian f32 array.
fn npy_head(rows: u64, width: usize) -> Vec<u8> {
    let text = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {width}), }}");
    let mut head = b"\x93NUMPY\x01\x00".to_vec();
    let len = NPY_HEAD - 10;
    head.extend(u16::try_from(len).unwrap_or(u16::MAX).to_le_bytes());
    head.extend(text.bytes());
    // Shapes of numbers that fit 64 bits are shorter than the head.
    head.resize(NPY_HEAD - 1, b' ');
    head.push(b'\n');
    head
}

/// A bar over the bytes of the file; a spinner where their number is not known.
fn bar(bytes: Option<u64>) -> ProgressBar {
    let (bar, template) = match bytes {
        Some(bytes) => (
            ProgressBar::new(bytes),
            "Embedding [{bar:40}] {percent}% of {total_bytes}, {elapsed} gone, {eta} left",
        ),
        None => (ProgressBar::new_spinner(), "Embedding {spinner} {bytes} read, {elapsed} gone"),
    };
    match ProgressStyle::with_template(template) {
        Ok(style) => bar.with_style(style.progress_chars("=> ")),
        Err(_) => bar,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_head_of_a_npy_file_has_one_length() {
        for (rows, width) in [(0, 1), (7, 768), (u64::MAX, 1 << 20)] {
            let head = npy_head(rows, width);
            assert_eq!(head.len() % 64, 0);
            assert_eq!(head.len(), NPY_HEAD);
            assert_eq!(&head[..6], b"\x93NUMPY");
            assert_eq!(usize::from(u16::from_le_bytes([head[8], head[9]])) + 10, NPY_HEAD);
            let text = String::from_utf8(head[10..].to_vec()).expect("ASCII");
            assert!(text.contains(&format!("({rows}, {width})")) && text.ends_with('\n'));
        }
    }
}
