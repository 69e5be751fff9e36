//! The header of a safetensors file: eight bytes of length, then JSON that says where each tensor lies.
//!
//! Everything the header claims is checked before anybody allocates by it: its own size, the type and shape of each
//! tensor against its number of bytes, and that the tensors cover the data exactly, without overlap or gap.

use std::fmt;

use serde::Deserialize;
use serde::de::{self, Deserializer, IgnoredAny, MapAccess, Visitor};

/// Longest header accepted; that of a model with 100,000 tensors is about 12 MiB.
pub(crate) const MAX_HEADER_BYTES: u64 = 32 << 20;
const MAX_TENSORS: usize = 100_000;
const MAX_DIMS: usize = 8;

/// One tensor as the header describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) name: String,
    /// As spelled in the file; one of those of [`bits`].
    pub(crate) dtype: String,
    pub(crate) shape: Vec<usize>,
    /// First byte, from the end of the header.
    pub(crate) begin: u64,
    /// Number of bytes.
    pub(crate) len: u64,
}

/// Bits of one element; `None` for a type that the format does not know.
fn bits(dtype: &str) -> Option<u64> {
    Some(match dtype {
        "F4" => 4,
        "F6_E2M3" | "F6_E3M2" => 6,
        "BOOL" | "U8" | "I8" | "F8_E4M3" | "F8_E5M2" | "F8_E8M0" | "F8_E4M3FNUZ" | "F8_E5M2FNUZ" => 8,
        "I16" | "U16" | "F16" | "BF16" => 16,
        "I32" | "U32" | "F32" => 32,
        "I64" | "U64" | "F64" | "C64" => 64,
        _ => return None,
    })
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawEntry {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: (u64, u64),
}

/// The header's object with its keys in file order, so that a name given twice is seen.
struct RawHeader(Vec<(String, RawEntry)>);

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct HeaderVisitor;
        impl<'de> Visitor<'de> for HeaderVisitor {
            type Value = RawHeader;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
                let mut entries = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<IgnoredAny>()?;
                        continue;
                    }
                    if entries.len() == MAX_TENSORS {
                        return Err(de::Error::custom(format!("more than {MAX_TENSORS} tensors")));
                    }
                    let entry = map.next_value::<RawEntry>();
                    let entry = entry.map_err(|e| de::Error::custom(format!("tensor {name:?}: {e}")))?;
                    entries.push((name, entry));
                }
                Ok(RawHeader(entries))
            }
        }
        deserializer.deserialize_map(HeaderVisitor)
    }
}

/// Checks the header length `header_len` of a file of `file_len` bytes and returns the number of bytes of data.
pub(crate) fn check_lengths(header_len: u64, file_len: u64) -> Result<u64, String> {
    if header_len > MAX_HEADER_BYTES {
        return Err(format!(
            "offset 0: header of {header_len} bytes; at most {MAX_HEADER_BYTES} are accepted"
        ));
    }
    file_len.checked_sub(8).and_then(|rest| rest.checked_sub(header_len)).ok_or_else(|| {
        format!("offset 0: header of {header_len} bytes in a file of {file_len}: truncated download?")
    })
}

/// Reads and checks a header, given without its length, before `data_len` bytes of data.
pub(crate) fn parse_header(header: &[u8], data_len: u64) -> Result<Vec<Entry>, String> {
    if header.first() != Some(&b'{') {
        return Err("offset 8: the header does not start with '{'".to_owned());
    }
    let RawHeader(raw) = serde_json::from_slice(header).map_err(|e| format!("header is not valid: {e}"))?;
    let mut entries = raw.into_iter().map(|(name, raw)| entry(name, raw)).collect::<Result<Vec<_>, _>>()?;

    entries.sort_unstable_by(|a, b| a.name.cmp(&b.name));
    if let Some(pair) = entries.windows(2).find(|pair| pair[0].name == pair[1].name) {
        return Err(format!("tensor {:?} is described twice", pair[0].name));
    }

    entries.sort_by_key(|entry| (entry.begin, entry.len));
    let mut end = 0;
    for entry in &entries {
        if entry.begin != end {
            let what = if entry.begin < end { "overlaps the tensor before it" } else { "follows a gap" };
            return Err(format!(
                "tensor {:?} at data offset {} {what} (wanted {end})",
                entry.name, entry.begin
            ));
        }
        // No overflow: `entry` computed begin + len as the stated end.
        end = entry.begin + entry.len;
    }
    if end != data_len {
        return Err(format!(
            "the tensors take {end} bytes of data, the file has {data_len}: truncated download?"
        ));
    }
    Ok(entries)
}

fn entry(name: String, raw: RawEntry) -> Result<Entry, String> {
    let RawEntry { dtype, shape, data_offsets: (begin, end) } = raw;
    let Some(bits) = bits(&dtype) else {
        return Err(format!("tensor {name:?} has the unknown type {dtype:?}"));
    };
    if shape.len() > MAX_DIMS {
        return Err(format!(
            "tensor {name:?} has {} dimensions; at most {MAX_DIMS} are accepted",
            shape.len()
        ));
    }
    let elements = shape.iter().try_fold(1u64, |n, dim| n.checked_mul(*dim as u64));
    let total_bits = elements.and_then(|n| n.checked_mul(bits)).filter(|bits| bits % 8 == 0);
    let Some(want) = total_bits.map(|bits| bits / 8) else {
        return Err(format!("tensor {name:?} of type {dtype}, shape {shape:?} has no number of bytes"));
    };
    let Some(len) = end.checked_sub(begin) else {
        return Err(format!("tensor {name:?} ends at data offset {end}, before its begin {begin}"));
    };
    if len != want {
        return Err(format!(
            "tensor {name:?} at data offset {begin} has {len} bytes; type {dtype} and shape {shape:?} take {want}"
        ));
    }
    Ok(Entry { name, dtype, shape, begin, len })
}

#[cfg(test)]
mod tests {
    use super::{check_lengths, parse_header};

    /// The refusal of `header` before `data_len` bytes of data.
    fn refusal(header: &str, data_len: u64) -> String {
        parse_header(header.as_bytes(), data_len).expect_err("the header must be refused")
    }

    const GOOD: &str = r#"{"__metadata__":{"format":"pt"},"a":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,12]},
        "b":{"dtype":"F32","shape":[],"data_offsets":[12,16]},"c":{"dtype":"I8","shape":[0,7],"data_offsets":[16,16]}}  "#;

    #[test]
    fn a_good_header_is_read() {
        let entries = parse_header(GOOD.as_bytes(), 16).expect("a good header");
        let ranges: Vec<_> = entries.iter().map(|e| (e.name.as_str(), e.begin, e.len)).collect();
        assert_eq!(ranges, [("a", 0, 12), ("b", 12, 4), ("c", 16, 0)]);
    }

    #[test]
    fn lengths_are_bounded() {
        assert_eq!(check_lengths(100, 208), Ok(100));
        assert!(check_lengths(1 << 26, u64::MAX).expect_err("cap").contains("at most 33554432"));
        assert!(check_lengths(101, 108).expect_err("short file").contains("truncated"));
        assert!(check_lengths(0, 3).expect_err("shorter than the length").contains("truncated"));
        assert!(check_lengths(u64::MAX, 8).is_err());
    }

    #[test]
    fn contradictions_are_refused_by_name_and_offset() {
        let one = |dtype: &str, shape: &str, offsets: &str| {
            format!(r#"{{"w":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#)
        };
        let cases = [
            (one("BF16", "[2,3]", "[0,13]"), 13, r#"tensor "w" at data offset 0 has 13 bytes"#),
            (one("BF16", "[2,3]", "[12,0]"), 12, "before its begin 12"),
            (one("Q4", "[2]", "[0,1]"), 1, r#"unknown type "Q4""#),
            (one("F4", "[3]", "[0,2]"), 2, "no number of bytes"),
            (one("F32", "[4294967296,4294967296,4294967296]", "[0,0]"), 0, "no number of bytes"),
            (one("F32", "[1,1,1,1,1,1,1,1,1]", "[0,4]"), 4, "9 dimensions"),
            (one("F32", "[-1]", "[0,4]"), 4, r#"tensor "w""#),
            (one("F32", "[1]", "[4,8]"), 8, "follows a gap"),
            (one("F32", "[1]", "[0,4]"), 8, "the file has 8"),
            (one("F32", "[2]", "[0,8]"), 4, "truncated download?"),
            (one("F32", "[2]", "[0,8]").replace("}}", r#","x":1}}"#), 8, "unknown field"),
            ("[]".to_owned(), 0, "does not start with"),
            (String::new(), 0, "does not start with"),
            ("{".to_owned(), 0, "not valid"),
        ];
        for (header, data_len, want) in cases {
            let message = refusal(&header, data_len);
            assert!(message.contains(want), "{header}: {message:?} lacks {want:?}");
        }
    }

    #[test]
    fn overlap_and_duplicates_are_refused() {
        let two = |second: &str, begin: u64| {
            format!(
                r#"{{"a":{{"dtype":"U8","shape":[8],"data_offsets":[0,8]}},"{second}":{{"dtype":"U8","shape":[8],"data_offsets":[{begin},{}]}}}}"#,
                begin + 8
            )
        };
        assert!(parse_header(two("b", 8).as_bytes(), 16).is_ok());
        assert!(refusal(&two("b", 4), 12).contains(r#"tensor "b" at data offset 4 overlaps"#));
        assert!(refusal(&two("b", 0), 8).contains("overlaps"));
        assert!(refusal(&two("a", 8), 16).contains("described twice"));
    }

    #[test]
    fn the_number_of_tensors_is_bounded() {
        let entry = |i: usize| format!(r#""{i}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#);
        let header = |n: usize| format!("{{{}}}", (0..n).map(entry).collect::<Vec<_>>().join(","));
        assert_eq!(parse_header(header(100_000).as_bytes(), 0).map(|e| e.len()), Ok(100_000));
        assert!(refusal(&header(100_001), 0).contains("more than 100000 tensors"));
    }

    proptest::proptest! {
        /// Whatever a few changed bytes make of a header: an answer, and a cover of the data when it is a good one.
        #[test]
        fn mutated_headers_do_not_panic(changes in proptest::collection::vec((0..GOOD.len(), 0u8..128), 1..6), len in 0u64..32) {
            let mut header = GOOD.as_bytes().to_vec();
            for (at, byte) in changes {
                header[at] = byte;
            }
            if let Ok(entries) = parse_header(&header, len) {
                proptest::prop_assert_eq!(entries.iter().map(|e| e.len).sum::<u64>(), len);
            }
        }

        #[test]
        fn random_offsets_never_pass_unless_they_cover_the_data(
            offsets in proptest::collection::vec((0u64..20, 0u64..20), 1..5), len in 0u64..40,
        ) {
            let entries: Vec<_> = offsets.iter().enumerate().map(|(i, (begin, n))| {
                format!(r#""{i}":{{"dtype":"U8","shape":[{n}],"data_offsets":[{begin},{}]}}"#, begin + n)
            }).collect();
            let header = format!("{{{}}}", entries.join(","));
            let mut covered = [0; 40];
            for (begin, n) in &offsets {
                (*begin..begin + n).for_each(|at| covered[at as usize] += 1);
            }
            let exact = covered.iter().enumerate().all(|(at, n)| *n == i32::from((at as u64) < len));
            if parse_header(header.as_bytes(), len).is_ok() {
                proptest::prop_assert!(exact);
            }
        }
    }
}
