//! Server-sent events out of a stream of bytes.

/// Bytes of one event at most: more is no event of a language model.
const MAX_EVENT: usize = 4 << 20;

/// Collects bytes and gives out the data of complete events.
#[derive(Debug, Default)]
pub(crate) struct SseParser {
    line: Vec<u8>,
    data: Vec<u8>,
    has_data: bool,
}

/// The stream is none of events.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct TooLong;

impl SseParser {
    /// Takes `bytes` and calls `event` with the data of each event that is now complete.
    ///
    /// # Errors
    /// If an event exceeds 4 MiB.
    pub(crate) fn push(&mut self, bytes: &[u8], mut event: impl FnMut(&[u8])) -> Result<(), TooLong> {
        let mut rest = bytes;
        while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
            self.line.extend_from_slice(&rest[..end]);
            rest = &rest[end + 1..];
            self.end_of_line(&mut event);
        }
        self.line.extend_from_slice(rest);
        if self.line.len() + self.data.len() > MAX_EVENT { Err(TooLong) } else { Ok(()) }
    }

    fn end_of_line(&mut self, event: &mut impl FnMut(&[u8])) {
        let line = self.line.strip_suffix(b"\r").unwrap_or(&self.line);
        if line.is_empty() {
            if std::mem::take(&mut self.has_data) {
                event(&self.data);
                self.data.clear();
            }
        } else if let Some(data) = line.strip_prefix(b"data:") {
            if self.has_data {
                self.data.push(b'\n');
            }
            self.has_data = true;
            self.data.extend_from_slice(data.strip_prefix(b" ").unwrap_or(data));
        }
        self.line.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn events(text: &[u8], piece: usize) -> Vec<String> {
        let mut parser = SseParser::default();
        let mut events = Vec::new();
        for bytes in text.chunks(piece) {
            parser.push(bytes, |data| events.push(String::from_utf8_lossy(data).into_owned())).unwrap();
        }
        events
    }

    #[test]
    fn events_are_the_same_however_the_bytes_are_cut() {
        let text = b": ping\n\ndata: {\"a\": 1}\n\nevent: x\r\ndata:two\r\ndata:  lines\r\n\r\ndata: [DONE]\n\ndata: half";
        for piece in 1..=text.len() {
            assert_eq!(events(text, piece), ["{\"a\": 1}", "two\n lines", "[DONE]"], "pieces of {piece}");
        }
    }

    #[test]
    fn a_stream_without_end_of_line_is_given_up() {
        let mut parser = SseParser::default();
        let piece = vec![b'x'; 1 << 20];
        let given_up = (0..8).find(|_| parser.push(&piece, |_| ()).is_err());
        assert_eq!(given_up, Some(4));
    }
}
