//! Text out of tokens, piece by piece: half characters are held back, and so is what may become a stop string.
//!
//! A token stands for bytes, not characters, and a stop string may begin in one token and end in the next. A stream cannot take back what it has
//! sent, so text leaves only once no continuation can change what it means.

/// The text of one answer as it comes.
#[derive(Debug, Default)]
pub(crate) struct TextStream {
    stops: Vec<String>,
    /// The beginning of a character.
    bytes: Vec<u8>,
    /// What ends with the beginning of a stop string.
    held: String,
}

/// What a token adds.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Pushed {
    /// Text that can go.
    pub(crate) text: String,
    /// A stop string came. It is not part of the text, nor is anything behind it.
    pub(crate) stopped: bool,
}

impl TextStream {
    /// Ends at the first of `stops`, none of which may be empty.
    pub(crate) fn new(stops: Vec<String>) -> Self {
        TextStream { stops, ..TextStream::default() }
    }

    /// The bytes of one more token.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> Pushed {
        self.bytes.extend_from_slice(bytes);
        let whole = self.bytes.len() - unfinished(&self.bytes);
        self.held.push_str(&String::from_utf8_lossy(&self.bytes[..whole]));
        self.bytes.drain(..whole);
        if let Some(at) = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str())).min() {
            self.held.truncate(at);
            self.bytes.clear();
            return Pushed { text: std::mem::take(&mut self.held), stopped: true };
        }
        let keep = self.stops.iter().map(|stop| overlap(&self.held, stop)).max().unwrap_or(0);
        let kept = self.held.split_off(self.held.len() - keep);
        Pushed { text: std::mem::replace(&mut self.held, kept), stopped: false }
    }

    /// What was held back, once nothing follows.
    pub(crate) fn finish(&mut self) -> String {
        let mut text = std::mem::take(&mut self.held);
        text.push_str(&String::from_utf8_lossy(&self.bytes));
        self.bytes.clear();
        text
    }
}

/// Bytes at the end that begin a character and do not end it.
fn unfinished(bytes: &[u8]) -> usize {
    // A character has at most four bytes, so only its first three can be without its end.
    for back in 1..=bytes.len().min(3) {
        let needed = match bytes[bytes.len() - back] {
            0x80..=0xbf => continue,
            0xc2..=0xdf => 2,
            0xe0..=0xef => 3,
            0xf0..=0xf4 => 4,
            _ => 0,
        };
        let tail = &bytes[bytes.len() - back..];
        // Bytes that no character begins with are not worth waiting for.
        let open = std::str::from_utf8(tail).is_err_and(|error| error.error_len().is_none());
        return if needed > back && open { back } else { 0 };
    }
    0
}

/// Bytes at the end of `text` that `stop` begins with.
fn overlap(text: &str, stop: &str) -> usize {
    let ends = stop.char_indices().map(|(at, _)| at).skip(1);
    ends.filter(|&end| text.ends_with(&stop[..end])).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn all(stops: &[&str], tokens: &[&[u8]]) -> (Vec<String>, bool) {
        let mut stream = TextStream::new(stops.iter().map(ToString::to_string).collect());
        let mut texts = Vec::new();
        for token in tokens {
            let pushed = stream.push(token);
            texts.push(pushed.text);
            if pushed.stopped {
                return (texts, true);
            }
        }
        texts.push(stream.finish());
        (texts, false)
    }

    #[test]
    fn half_characters_wait_for_their_other_half() {
        let euro = "€".as_bytes();
        assert_eq!(all(&[], &[b"a", &euro[..1], &euro[1..2], &euro[2..]]).0, ["a", "", "", "€", ""]);
        assert_eq!(all(&[], &[&euro[..2]]).0, ["", "\u{fffd}"]);
        assert_eq!(all(&[], &[&[0xff], b"b"]).0, ["\u{fffd}", "b", ""]);
    }

    #[test]
    fn stop_strings_are_found_across_tokens() {
        assert_eq!(
            all(&["END"], &[b"one E", b"N", b"D two"]),
            (vec!["one ".into(), "".into(), "".into()], true)
        );
        assert_eq!(all(&["END"], &[b"one E", b"N", b"ding"]).0, ["one ", "", "ENding", ""]);
        assert_eq!(all(&["END", "e"], &[b"one END"]), (vec!["on".into()], true));
        assert_eq!(all(&["END"], &[b"E"]).0, ["", "E"]);
        assert_eq!(all(&["\n\n"], &["é\n".as_bytes(), b"\n"]), (vec!["é".into(), "".into()], true));
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// However bytes are cut into tokens, the text is what it would be in one piece, up to the first stop string.
        #[test]
        fn cuts_do_not_show(text in "[abé€😀]{0,30}", stop in "[abé]{1,3}", cuts in prop::collection::vec(1usize..5, 60)) {
            let mut stream = TextStream::new(vec![stop.clone()]);
            let (mut rest, mut got, mut stopped) = (text.as_bytes(), String::new(), false);
            for cut in cuts {
                let (token, after) = rest.split_at(cut.min(rest.len()));
                rest = after;
                let pushed = stream.push(token);
                got.push_str(&pushed.text);
                stopped = pushed.stopped;
                if stopped {
                    break;
                }
            }
            if !stopped {
                got.push_str(&stream.finish());
            }
            let expected = text.split(&stop).next().unwrap_or_default();
            prop_assert_eq!(got, expected);
            prop_assert_eq!(stopped, text.contains(&stop));
        }

        /// Bytes that are no text at all come out as replacement characters, and do not get stuck.
        #[test]
        fn any_bytes(tokens in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..4), 0..40)) {
            let mut stream = TextStream::new(Vec::new());
            let mut got = String::new();
            for token in &tokens {
                got.push_str(&stream.push(token).text);
                prop_assert!(stream.bytes.len() < 4);
            }
            got.push_str(&stream.finish());
            let all: Vec<u8> = tokens.concat();
            prop_assert_eq!(got, String::from_utf8_lossy(&all));
        }
    }
}
