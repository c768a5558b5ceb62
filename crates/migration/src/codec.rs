//! Encodes and decodes numbers, strings and bytes, for untrusted input: bodies of frames, files,
//! and formats of the VMM's own. All little-endian.

use crate::error::MigrationError;

/// Why decoding failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// The input is too short.
    #[error("it ends too early")]
    Short,
    /// The input has trailing bytes.
    #[error("{left} bytes are left over")]
    Long {
        /// Number of trailing bytes.
        left: usize,
    },
    /// A count exceeds its limit.
    #[error("{count} {what}, and the limit is {max}")]
    TooMany {
        /// What is counted.
        what: &'static str,
        /// The count.
        count: u64,
        /// The limit.
        max: u64,
    },
    /// A number has no meaning here.
    #[error("{what} cannot be {value:#x}")]
    Value {
        /// The field.
        what: &'static str,
        /// Its value.
        value: u64,
    },
    /// A reserved byte is not 0.
    #[error("a reserved byte is not 0")]
    Reserved,
    /// A string is not printable ASCII.
    #[error("a name is not printable ASCII")]
    Text,
}

/// In a message, this is the peer's fault.
impl From<Malformed> for MigrationError {
    fn from(error: Malformed) -> Self {
        let what = match error {
            Malformed::Short => "a message is shorter than it must be",
            Malformed::Long { .. } | Malformed::TooMany { .. } => {
                "a message is longer than it may be"
            }
            Malformed::Value { what, .. } => what,
            Malformed::Reserved => "a reserved byte is not 0",
            Malformed::Text => "a name is not printable ASCII",
        };
        Self::Peer { what }
    }
}

/// Decodes bytes in order. Each call consumes what it returns. After an error, stop reading.
#[derive(Clone, Copy, Debug)]
pub struct Reader<'a> {
    rest: &'a [u8],
}

type Read<T> = Result<T, Malformed>;

impl<'a> Reader<'a> {
    /// Reads `bytes` from the start.
    #[must_use]
    pub const fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    /// Number of bytes that are left.
    #[must_use]
    pub const fn left(&self) -> usize {
        self.rest.len()
    }

    /// Reads `len` bytes.
    ///
    /// # Errors
    /// [`Malformed::Short`].
    pub fn bytes(&mut self, len: usize) -> Read<&'a [u8]> {
        let (bytes, rest) = self.rest.split_at_checked(len).ok_or(Malformed::Short)?;
        self.rest = rest;
        Ok(bytes)
    }

    /// Reads `N` bytes.
    ///
    /// # Errors
    /// As [`bytes`](Self::bytes).
    pub fn array<const N: usize>(&mut self) -> Read<[u8; N]> {
        let (bytes, rest) = self.rest.split_first_chunk::<N>().ok_or(Malformed::Short)?;
        self.rest = rest;
        Ok(*bytes)
    }

    /// Reads a number.
    ///
    /// # Errors
    /// As [`bytes`](Self::bytes).
    pub fn u8(&mut self) -> Read<u8> {
        self.array::<1>().map(|[byte]| byte)
    }

    /// Reads a number.
    ///
    /// # Errors
    /// As [`bytes`](Self::bytes).
    pub fn u16(&mut self) -> Read<u16> {
        self.array().map(u16::from_le_bytes)
    }

    /// Reads a number.
    ///
    /// # Errors
    /// As [`bytes`](Self::bytes).
    pub fn u32(&mut self) -> Read<u32> {
        self.array().map(u32::from_le_bytes)
    }

    /// Reads a number.
    ///
    /// # Errors
    /// As [`bytes`](Self::bytes).
    pub fn u64(&mut self) -> Read<u64> {
        self.array().map(u64::from_le_bytes)
    }

    /// Reads a byte that is 0 or 1.
    ///
    /// # Errors
    /// [`Malformed::Value`], and as [`bytes`](Self::bytes).
    pub fn flag(&mut self, what: &'static str) -> Read<bool> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            value => Err(Malformed::Value { what, value: value.into() }),
        }
    }

    /// Reads a count, at most `most`. Checked before anything is allocated.
    pub(crate) fn count(&mut self, most: usize) -> Read<usize> {
        let count = self.u32()?;
        let max = most as u64;
        let known = usize::try_from(count).ok().filter(|count| *count <= most);
        known.ok_or(Malformed::TooMany { what: "items", count: count.into(), max })
    }

    /// Reads reserved bytes, which must be 0.
    pub(crate) fn reserved(&mut self, len: usize) -> Read<()> {
        let zeros = self.bytes(len)?.iter().all(|byte| *byte == 0);
        if zeros { Ok(()) } else { Err(Malformed::Reserved) }
    }

    /// Reads a length and a string of at most `most` bytes.
    pub(crate) fn text(&mut self, most: usize) -> Read<String> {
        let len = self.count(most)?;
        let bytes = self.bytes(len)?;
        if !bytes.iter().all(|byte| matches!(byte, b' '..=b'~')) {
            return Err(Malformed::Text);
        }
        Ok(bytes.iter().copied().map(char::from).collect())
    }

    /// Checks that no bytes are left.
    ///
    /// # Errors
    /// [`Malformed::Long`].
    pub const fn finish(self) -> Read<()> {
        match self.rest.len() {
            0 => Ok(()),
            left => Err(Malformed::Long { left }),
        }
    }
}

/// Encodes a body.
#[derive(Default)]
pub(crate) struct Writer(pub(crate) Vec<u8>);

impl Writer {
    pub(crate) fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    pub(crate) fn u8(self, value: u8) -> Self {
        self.bytes(&[value])
    }

    pub(crate) fn u16(self, value: u16) -> Self {
        self.bytes(&value.to_le_bytes())
    }

    pub(crate) fn u32(self, value: u32) -> Self {
        self.bytes(&value.to_le_bytes())
    }

    pub(crate) fn u64(self, value: u64) -> Self {
        self.bytes(&value.to_le_bytes())
    }

    /// Writes a count, which the caller keeps within its limit.
    pub(crate) fn count(self, count: usize) -> Self {
        self.u32(u32::try_from(count).unwrap_or(u32::MAX))
    }

    /// Writes a string, cut to `most` bytes, with `?` for bytes that are not printable ASCII.
    pub(crate) fn text(self, text: &str, most: usize) -> Self {
        let printable = |byte: u8| if matches!(byte, b' '..=b'~') { byte } else { b'?' };
        let bytes: Vec<u8> = text.bytes().take(most).map(printable).collect();
        self.count(bytes.len()).bytes(&bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_decoded_or_refused() {
        let bytes = Writer::default().u8(1).u16(2).u32(3).u64(4).text("five", 9).0;
        let mut reader = Reader::new(&bytes);
        assert_eq!((reader.flag("it"), reader.u16(), reader.u32()), (Ok(true), Ok(2), Ok(3)));
        assert_eq!((reader.u64(), reader.text(9)), (Ok(4), Ok("five".to_owned())));
        assert_eq!(reader.finish(), Ok(()));
        assert_eq!(Reader::new(&[2]).flag("it"), Err(Malformed::Value { what: "it", value: 2 }));
        assert_eq!(Reader::new(&[0; 3]).finish(), Err(Malformed::Long { left: 3 }));
        assert_eq!(Reader::new(&[0; 3]).u32(), Err(Malformed::Short));
        assert_eq!(Reader::new(&[0, 1]).reserved(2), Err(Malformed::Reserved));
        assert_eq!(Reader::new(&[1, 0, 0, 0, 7]).text(1), Err(Malformed::Text));
        let many = Malformed::TooMany { what: "items", count: 0xffff_ffff, max: 9 };
        assert_eq!(Reader::new(&[0xff; 4]).count(9), Err(many));
    }
}
