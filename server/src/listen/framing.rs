//! A look at the raw head of each request.
//!
//! hyper follows the standard where a head has both `Transfer-Encoding` and `Content-Length`, or the same length
//! twice: it drops one and goes on. A proxy before us may drop the other, and then the two disagree about where the
//! next request begins. What hyper dropped no handler can see, so the bytes are looked at here.

/// Bytes of a head that are kept at most; hyper refuses longer ones.
const MAX_HEAD: usize = 64 << 10;

/// Keeps the bytes that arrive while a head is expected.
#[derive(Debug, Default)]
pub(super) struct Head {
    bytes: Vec<u8>,
    /// False while a request is being answered: what arrives then is its body.
    waiting: bool,
}

impl Head {
    /// For a new connection.
    pub(super) fn new() -> Self {
        Self { bytes: Vec::new(), waiting: true }
    }

    /// Whether bytes of a head that is not complete have arrived.
    pub(super) fn has_part(&self) -> bool {
        self.waiting && !self.bytes.is_empty()
    }

    /// Bytes arrived.
    pub(super) fn arrived(&mut self, bytes: &[u8]) {
        if self.waiting {
            let room = MAX_HEAD.saturating_sub(self.bytes.len());
            self.bytes.extend_from_slice(bytes.get(..room.min(bytes.len())).unwrap_or_default());
        }
    }

    /// A head is complete: whether it announces a length more than once. `chunked`: what hyper understood.
    pub(super) fn is_odd(&mut self, chunked: bool) -> bool {
        let bytes = std::mem::take(&mut self.bytes);
        self.waiting = false;
        let mut lengths = 0_usize;
        let mut codings = 0_usize;
        for line in bytes.split(|byte| *byte == b'\n').skip(1) {
            let line = line.strip_suffix(b"\r").unwrap_or(line);
            if line.is_empty() {
                break;
            }
            let name = line.split(|byte| *byte == b':').next().unwrap_or_default().trim_ascii();
            lengths += usize::from(name.eq_ignore_ascii_case(b"content-length"));
            codings += usize::from(name.eq_ignore_ascii_case(b"transfer-encoding"));
        }
        // A pipelined head arrived with the request before it and was not kept. With a plain length it is harmless.
        let unseen = chunked && codings == 0;
        lengths > 1 || codings > 1 || (lengths > 0 && codings > 0) || unseen
    }

    /// The answer is made: the next bytes are a head.
    pub(super) fn expect(&mut self) {
        self.bytes.clear();
        self.waiting = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_are_counted_in_the_head_only() {
        let odd = |text: &str, chunked| {
            let mut head = Head::new();
            for part in text.as_bytes().chunks(3) {
                head.arrived(part);
            }
            head.is_odd(chunked)
        };
        assert!(!odd("POST / HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc", false));
        assert!(!odd("POST / HTTP/1.1\r\nContent-Length: 19\r\n\r\ncontent-length: 3\r\n", false));
        assert!(!odd("POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", true));
        assert!(odd("POST / HTTP/1.1\r\nContent-Length: 3\r\ncontent-length: 3\r\n\r\nabc", false));
        assert!(odd(
            "POST / HTTP/1.1\r\nCONTENT-LENGTH: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            true
        ));
        assert!(odd(
            "POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n",
            true
        ));
        assert!(odd("", true), "a pipelined chunked request");
        assert!(!odd("", false), "a pipelined request of known length");
    }
}
