//! Bytes of the machine's state: little-endian, field by field, and read with the name of the field at hand.

use std::fmt;

/// Why bytes are not the state of a machine.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the state's {field} {problem}")]
pub(crate) struct Malformed {
    /// Where in the state, outermost first: `cpu 1 sregs cr3`.
    pub(crate) field: String,
    /// What is wrong there.
    pub(crate) problem: Problem,
}

/// What is wrong with a field.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Problem {
    /// The bytes end before it does.
    EndsEarly,
    /// It claims to have more elements than any machine has.
    TooMany {
        /// How many it claims.
        claimed: u64,
        /// How many there may be.
        most: u64,
    },
    /// It has a value that nothing has.
    Unknown(u64),
    /// Bytes are left over behind it.
    LeftOver(usize),
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::EndsEarly => f.write_str("is cut off"),
            Self::TooMany { claimed, most } => {
                write!(
                    f,
                    "claims {claimed} elements, and {most} are the most there can be"
                )
            }
            Self::Unknown(value) => write!(f, "is {value:#x}, which this version does not know"),
            Self::LeftOver(bytes) => {
                write!(f, "is followed by {bytes} bytes that nothing asks for")
            }
        }
    }
}

impl Malformed {
    pub(crate) fn new(problem: Problem) -> Self {
        Self {
            field: String::new(),
            problem,
        }
    }

    /// The same, within `outer`.
    pub(crate) fn within(mut self, outer: impl fmt::Display) -> Self {
        self.field = if self.field.is_empty() {
            outer.to_string()
        } else {
            format!("{outer} {}", self.field)
        };
        self
    }
}

/// Bytes that are still to be read.
#[derive(Debug)]
pub(crate) struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub(crate) fn bytes<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let (bytes, rest) = self
            .0
            .split_first_chunk::<N>()
            .ok_or_else(|| Malformed::new(Problem::EndsEarly))?;
        self.0 = rest;
        Ok(*bytes)
    }

    /// Reads what is called `name`.
    pub(crate) fn field<T: Coded>(&mut self, name: impl fmt::Display) -> Result<T, Malformed> {
        T::take(self).map_err(|error| error.within(name))
    }

    /// Whether everything was read.
    pub(crate) fn end(&self) -> Result<(), Malformed> {
        match self.0.len() {
            0 => Ok(()),
            left => Err(Malformed::new(Problem::LeftOver(left))),
        }
    }
}

/// What has a place in the state.
pub(crate) trait Coded: Sized {
    /// Appends it.
    fn put(&self, output: &mut Vec<u8>);

    /// Reads it.
    fn take(input: &mut Input<'_>) -> Result<Self, Malformed>;
}

macro_rules! integers {
    ($($type:ty),*) => {$(
        impl Coded for $type {
            fn put(&self, output: &mut Vec<u8>) {
                output.extend_from_slice(&self.to_le_bytes());
            }

            fn take(input: &mut Input<'_>) -> Result<Self, Malformed> {
                input.bytes().map(Self::from_le_bytes)
            }
        }
    )*};
}

integers!(u8, i8, u16, u32, u64, i64);

impl Coded for bool {
    fn put(&self, output: &mut Vec<u8>) {
        u8::from(*self).put(output);
    }

    fn take(input: &mut Input<'_>) -> Result<Self, Malformed> {
        match u8::take(input)? {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(Malformed::new(Problem::Unknown(other.into()))),
        }
    }
}

impl<T: Coded + Copy + Default, const N: usize> Coded for [T; N] {
    fn put(&self, output: &mut Vec<u8>) {
        self.iter().for_each(|element| element.put(output));
    }

    fn take(input: &mut Input<'_>) -> Result<Self, Malformed> {
        let mut elements = [T::default(); N];
        for (index, element) in elements.iter_mut().enumerate() {
            *element = input.field(index)?;
        }
        Ok(elements)
    }
}

/// The most elements of a list: more than KVM has MSRs or CPUID leaves, and little enough to allocate.
const MOST: u32 = 4096;

impl<T: Coded> Coded for Vec<T> {
    fn put(&self, output: &mut Vec<u8>) {
        let len = u32::try_from(self.len()).expect("lists here are short");
        len.put(output);
        self.iter().for_each(|element| element.put(output));
    }

    fn take(input: &mut Input<'_>) -> Result<Self, Malformed> {
        let len: u32 = input.field("length")?;
        if len > MOST {
            return Err(Malformed::new(Problem::TooMany {
                claimed: len.into(),
                most: MOST.into(),
            }));
        }
        (0..len).map(|index| input.field(index)).collect()
    }
}

/// Makes structures [`Coded`]: these fields, in this order. Others, which are padding, are zero.
macro_rules! coded {
    ($($type:ty { $($field:ident),* $(,)? })*) => {$(
        impl $crate::state::coding::Coded for $type {
            fn put(&self, output: &mut Vec<u8>) {
                $( $crate::state::coding::Coded::put(&self.$field, output); )*
            }

            fn take(
                input: &mut $crate::state::coding::Input<'_>,
            ) -> Result<Self, $crate::state::coding::Malformed> {
                let mut read = Self::default();
                $( read.$field = input.field(stringify!($field))?; )*
                Ok(read)
            }
        }
    )*};
}

pub(crate) use coded;

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Default, PartialEq)]
    struct Sample {
        small: u16,
        list: Vec<u32>,
        padding: u64,
    }

    coded! { Sample { small, list } }

    fn bytes(sample: &Sample) -> Vec<u8> {
        let mut output = Vec::new();
        sample.put(&mut output);
        output
    }

    #[test]
    fn integers_are_little_endian_and_padding_is_left_out() {
        let sample = Sample {
            small: 0x0102,
            list: vec![3],
            padding: 9,
        };
        let bytes = bytes(&sample);
        assert_eq!(bytes, [2, 1, 1, 0, 0, 0, 3, 0, 0, 0]);
        let read = Sample::take(&mut Input::new(&bytes)).unwrap();
        assert_eq!(
            read,
            Sample {
                padding: 0,
                ..sample
            }
        );
    }

    #[test]
    fn what_is_cut_off_is_named() {
        let whole = bytes(&Sample {
            small: 1,
            list: vec![1, 2],
            padding: 0,
        });
        for (len, field) in [(1, "small"), (5, "list length"), (13, "list 1")] {
            let error = Sample::take(&mut Input::new(&whole[..len])).unwrap_err();
            assert_eq!(error.field, field);
            assert_eq!(error.problem, Problem::EndsEarly);
        }
    }

    #[test]
    fn a_length_allocates_nothing_before_it_is_checked() {
        let error = Sample::take(&mut Input::new(&[0, 0, 255, 255, 255, 255])).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the state's list claims 4294967295 elements, and 4096 are the most there can be"
        );
    }
}
