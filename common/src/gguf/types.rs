//! What a GGUF file holds: metadata values, and the kinds of numbers that tensors are made of.

/// A metadata value. Integers and floats keep their value, not their width.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    String(String),
    Array(Vec<Value>),
}

impl Value {
    pub fn as_u64(&self) -> Option<u64> {
        match self {
            Self::Unsigned(n) => Some(*n),
            Self::Signed(n) => (*n).try_into().ok(),
            _ => None,
        }
    }
    pub fn as_f64(&self) -> Option<f64> {
        match self {
            Self::Float(n) => Some(*n),
            Self::Unsigned(n) => Some(*n as f64),
            Self::Signed(n) => Some(*n as f64),
            _ => None,
        }
    }
    pub fn as_bool(&self) -> Option<bool> {
        if let Self::Bool(b) = self { Some(*b) } else { None }
    }
    pub fn as_str(&self) -> Option<&str> {
        if let Self::String(s) = self { Some(s) } else { None }
    }
    pub fn as_array(&self) -> Option<&[Value]> {
        if let Self::Array(a) = self { Some(a) } else { None }
    }
}

macro_rules! types {
    ($($name:ident = $id:literal, $text:literal, $elements:literal elements in $bytes:literal bytes;)*) => {
        /// How a tensor's numbers are stored: in blocks of so many elements and bytes, along the innermost axis.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[allow(non_camel_case_types, reason = "ggml's own names")]
        pub enum GgmlType {
            $($name,)*
        }

        impl GgmlType {
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// Finds the type of an id, if it is one that we know the size of.
            pub fn from_id(id: u32) -> Option<Self> {
                match id {
                    $($id => Some(Self::$name),)*
                    _ => None,
                }
            }
            /// The id in the file (`enum ggml_type`).
            pub fn id(self) -> u32 {
                match self {
                    $(Self::$name => $id,)*
                }
            }
            pub fn block_elements(self) -> u64 {
                match self {
                    $(Self::$name => $elements,)*
                }
            }
            pub fn block_bytes(self) -> u64 {
                match self {
                    $(Self::$name => $bytes,)*
                }
            }
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$name => $text,)*
                }
            }
        }
    };
}

types! {
    F32 = 0, "F32", 1 elements in 4 bytes;
    F16 = 1, "F16", 1 elements in 2 bytes;
    Q4_0 = 2, "Q4_0", 32 elements in 18 bytes;
    Q4_1 = 3, "Q4_1", 32 elements in 20 bytes;
    Q5_0 = 6, "Q5_0", 32 elements in 22 bytes;
    Q5_1 = 7, "Q5_1", 32 elements in 24 bytes;
    Q8_0 = 8, "Q8_0", 32 elements in 34 bytes;
    Q4_K = 12, "Q4_K", 256 elements in 144 bytes;
    Q5_K = 13, "Q5_K", 256 elements in 176 bytes;
    Q6_K = 14, "Q6_K", 256 elements in 210 bytes;
    BF16 = 30, "BF16", 1 elements in 2 bytes;
}

impl std::fmt::Display for GgmlType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}
