//! Reads a payload from its beginning. What is not there is an error, never a panic.

use std::ops::RangeInclusive;

use super::ColdError;

#[derive(Debug, Clone)]
pub(super) struct Input<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Input<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Input { bytes, at: 0 }
    }

    /// The next `len` bytes.
    pub(super) fn take(&mut self, len: usize) -> Result<&'a [u8], ColdError> {
        let rest = self.bytes.len() - self.at;
        if len > rest {
            return Err(ColdError::PayloadEnds { at_byte: self.at, needed_bytes: len, left_bytes: rest });
        }
        let taken = &self.bytes[self.at..][..len];
        self.at += len;
        Ok(taken)
    }

    pub(super) fn byte(&mut self) -> Result<u8, ColdError> {
        Ok(self.take(1)?[0])
    }

    pub(super) fn word(&mut self) -> Result<u32, ColdError> {
        let mut word = [0; 4];
        word.copy_from_slice(self.take(4)?);
        Ok(u32::from_le_bytes(word))
    }

    /// Refuses what an encoder does not write.
    pub(super) fn within(
        &self,
        what: &'static str,
        found: usize,
        allowed: RangeInclusive<usize>,
    ) -> Result<(), ColdError> {
        if allowed.contains(&found) {
            return Ok(());
        }
        Err(ColdError::Payload {
            what,
            at_byte: self.at,
            found,
            least: *allowed.start(),
            most: *allowed.end(),
        })
    }

    /// Everything that was not taken.
    pub(super) fn rest(&self) -> &'a [u8] {
        &self.bytes[self.at..]
    }

    /// Nothing may be left.
    pub(super) fn finish(self) -> Result<(), ColdError> {
        self.within("bytes behind the payload", self.bytes.len() - self.at, 0..=0)
    }
}
