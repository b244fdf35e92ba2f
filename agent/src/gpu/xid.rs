//! What the driver's error numbers (Xids) mean: one table, every number in exactly one class.
//!
//! Pure. After NVIDIA's catalogue as read on 2026-11-24; a number that stands nowhere is told and changes nothing.

use std::ops::RangeInclusive;

/// What an Xid asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Class {
    /// The program's own: the driver has ended it, so its worker fails and is started again. No fault of the GPU, unless
    /// it happens again and again.
    Application,
    /// The GPU must be reset.
    Reset,
    /// The server must be restarted.
    Restart,
    /// Depends on what else is seen; the judge knows how.
    Rule,
    /// Noted only.
    Record,
    /// The GPU is broken.
    Hardware,
    /// The driver or its firmware: an operator should look.
    Software,
    /// In no table.
    Unknown,
}

/// The Xids whose meaning depends on others: they are named where that is decided.
pub const DOUBLE_BIT: u32 = 48;
pub const NVLINK: u32 = 74;
pub const CLEANUP: u32 = 45;
pub const FELL_OFF: u32 = 79;
pub const MANY_CORRECTED: u32 = 92;
pub const CONTAINED: u32 = 94;
pub const UNCONTAINED: u32 = 95;

type Codes = &'static [RangeInclusive<u32>];

/// The table.
const CLASSES: [(Class, Codes); 7] = [
    (
        Class::Application,
        &[
            8..=8,
            11..=11,
            13..=13,
            25..=25,
            31..=32,
            39..=41,
            60..=60,
            68..=72,
            75..=77,
            80..=80,
            82..=86,
            88..=89,
            94..=94,
            96..=105,
            126..=135,
            139..=139,
        ],
    ),
    (
        Class::Reset,
        &[
            46..=46,
            62..=62,
            64..=64,
            95..=95,
            109..=110,
            119..=120,
            136..=136,
            140..=140,
            143..=143,
            155..=156,
            158..=158,
        ],
    ),
    (Class::Restart, &[79..=79]),
    (Class::Rule, &[45..=45, 48..=48, 74..=74, 154..=154]),
    (
        Class::Record,
        &[
            37..=38,
            43..=44,
            63..=63,
            66..=67,
            92..=93,
            106..=107,
            121..=121,
            137..=137,
            141..=141,
            152..=153,
            157..=157,
            160..=161,
        ],
    ),
    (Class::Hardware, &[54..=54]),
    (Class::Software, &[78..=78, 151..=151]),
];

/// Returns the class of an Xid.
pub fn class(code: u32) -> Class {
    let holds = |(_, codes): &&(Class, Codes)| codes.iter().any(|range| range.contains(&code));
    CLASSES.iter().find(holds).map_or(Class::Unknown, |(class, _)| *class)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_has_exactly_one_class() {
        for code in 0..1000 {
            let rows = CLASSES.iter().flat_map(|(class, codes)| codes.iter().map(move |range| (class, range)));
            let classes: Vec<&Class> =
                rows.filter(|(_, range)| range.contains(&code)).map(|(class, _)| class).collect();
            assert!(classes.len() <= 1, "Xid {code} stands in {classes:?}");
            assert_eq!(class(code), classes.first().map_or(Class::Unknown, |class| **class), "Xid {code}");
        }
    }

    #[test]
    fn the_classes_are_those_of_the_catalogue() {
        let count = |class| (0..1000).filter(|code| super::class(*code) == class).count();
        assert_eq!([Class::Application, Class::Reset, Class::Restart, Class::Rule].map(count), [48, 14, 1, 4]);
        assert_eq!([Class::Record, Class::Hardware, Class::Software].map(count), [19, 1, 2]);
        for (code, expected) in [
            (13, Class::Application),
            (31, Class::Application),
            (94, Class::Application),
            (48, Class::Rule),
            (74, Class::Rule),
            (63, Class::Record),
            (64, Class::Reset),
            (95, Class::Reset),
            (119, Class::Reset),
            (79, Class::Restart),
            (54, Class::Hardware),
            (151, Class::Software),
            (1, Class::Unknown),
        ] {
            assert_eq!(class(code), expected, "Xid {code}");
        }
    }
}
