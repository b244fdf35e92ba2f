//! Which blocks of the cache belong to whom. Pure.
//!
//! A block holds the keys and values of 16 positions. A full block is named by what it holds (`izar_common::prefix`): a
//! new sequence of the same tenant that begins alike takes the block over instead of computing it, and nobody else can,
//! or can find out by timing what was asked. Blocks that nobody uses keep their names until they are needed, the longest
//! unused first. Where only the beginning of a named block is alike, the new sequence gets a copy and goes on in it. A
//! block that goes from one tenant to another is cleared.

use std::collections::{BTreeMap, HashMap};

use izar_common::chat::Token;
use izar_common::prefix::{self, Name, Namer, Sketch};

use crate::ops::TOKENS;

const _: () = assert!(TOKENS == prefix::BLOCK, "what has a name is a block of the cache");

/// A block of the cache.
pub type Block = u32;

/// What a full block is found by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Title {
    pub name: Name,
    /// The block before it.
    pub before: Name,
    pub tokens: [Token; TOKENS],
}

/// What is known of a block.
#[derive(Debug, Clone, Default)]
struct Entry {
    /// Sequences that use it.
    users: u32,
    title: Option<Box<Title>>,
    /// Whose numbers are in it, if any are.
    salt: Option<[u8; 16]>,
    /// When it was last given back.
    unused_since: u64,
}

/// All blocks of one model's cache.
#[derive(Debug)]
pub struct Blocks {
    entries: Vec<Entry>,
    by_name: HashMap<Name, Block>,
    /// Named blocks, by the one before them.
    after: HashMap<Name, Vec<Block>>,
    /// Unused blocks without a name, the last one to be taken first.
    empty: Vec<Block>,
    /// Unused blocks with a name, by when they were given back.
    unused: BTreeMap<u64, Block>,
    /// Counts what is given back.
    clock: u64,
    /// Blocks that the next step must clear.
    cleared: Vec<Block>,
    /// Counts names that came and went.
    changes: u64,
}

impl Blocks {
    pub fn new(count: usize) -> Self {
        let count = u32::try_from(count).expect("blocks are counted in 32 bits");
        Self {
            entries: vec![Entry::default(); count as usize],
            by_name: HashMap::new(),
            after: HashMap::new(),
            empty: (0..count).rev().collect(),
            unused: BTreeMap::new(),
            clock: 0,
            cleared: Vec::new(),
            changes: 0,
        }
    }
    /// Blocks that a sequence can get.
    pub fn available(&self) -> usize {
        self.empty.len() + self.unused.len()
    }
    pub fn count(&self) -> usize {
        self.entries.len()
    }

    pub fn knows(&self, name: Name) -> bool {
        self.by_name.contains_key(&name)
    }
    /// Finds the block after `before` whose tokens begin most like these; returns how many are alike, if any.
    pub fn alike(&self, before: Name, tokens: &[Token]) -> Option<(Name, usize)> {
        let common = |title: &Title| title.tokens.iter().zip(tokens).take_while(|(a, b)| a == b).count();
        let titles = self.after.get(&before)?.iter().filter_map(|block| self.entries[*block as usize].title.as_ref());
        titles.map(|title| (title.name, common(title))).filter(|(_, n)| *n > 0).max_by_key(|(_, n)| *n)
    }

    /// Counts the changes of what has a name.
    pub fn changes(&self) -> u64 {
        self.changes
    }
    /// A note of all names.
    pub fn sketch(&self) -> Sketch {
        Sketch::of(self.by_name.keys())
    }

    /// Takes over the block of a name, if there is one.
    pub fn share(&mut self, name: Name) -> Option<Block> {
        let block = *self.by_name.get(&name)?;
        let entry = &mut self.entries[block as usize];
        if entry.users == 0 {
            self.unused.remove(&entry.unused_since);
        }
        entry.users += 1;
        Some(block)
    }
    /// Gives a block to write in, or `None` if all are used.
    pub fn take(&mut self, namer: &Namer) -> Option<Block> {
        let block = match self.empty.pop() {
            Some(block) => block,
            None => self.unused.pop_first()?.1,
        };
        let entry = &mut self.entries[block as usize];
        if let Some(title) = entry.title.take() {
            self.changes += 1;
            self.by_name.remove(&title.name);
            if let Some(list) = self.after.get_mut(&title.before) {
                list.retain(|other| *other != block);
                if list.is_empty() {
                    self.after.remove(&title.before);
                }
            }
        }
        if entry.salt.is_some_and(|salt| salt != namer.salt()) {
            self.cleared.push(block);
        }
        entry.salt = Some(namer.salt());
        entry.users = 1;
        Some(block)
    }
    /// Names a block that is full now. Another one may have the name already: then this one stays without.
    pub fn name(&mut self, block: Block, title: Title) {
        let entry = &mut self.entries[block as usize];
        if entry.title.is_none() && !self.by_name.contains_key(&title.name) {
            self.changes += 1;
            self.by_name.insert(title.name, block);
            self.after.entry(title.before).or_default().push(block);
            entry.title = Some(Box::new(title));
        }
    }
    /// Gives blocks back that a sequence has taken or shares. Its last block is reused before its first: what begins
    /// alike is found from the beginning.
    pub fn give_back(&mut self, blocks: &[Block]) {
        for &block in blocks.iter().rev() {
            let entry = &mut self.entries[block as usize];
            entry.users = entry.users.checked_sub(1).expect("a block is given back as often as it was taken");
            if entry.users > 0 {
                continue;
            }
            if entry.title.is_some() {
                self.clock += 1;
                entry.unused_since = self.clock;
                self.unused.insert(self.clock, block);
            } else {
                self.empty.push(block);
            }
        }
    }
    /// Blocks that must be cleared before they are written again.
    pub fn take_cleared(&mut self) -> Vec<Block> {
        std::mem::take(&mut self.cleared)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn names(namer: &Namer, count: u32) -> Vec<Name> {
        titles(namer, count).into_iter().map(|title| title.name).collect()
    }
    fn titles(namer: &Namer, count: u32) -> Vec<Title> {
        let mut before = namer.root();
        let mut title = |block| {
            let (tokens, from) = ([block; TOKENS], before);
            before = namer.name(from, &tokens);
            Title { name: before, before: from, tokens }
        };
        (0..count).map(&mut title).collect()
    }

    #[test]
    fn named_blocks_are_shared_while_they_are_used_and_after() {
        let (mut blocks, namer) = (Blocks::new(2), Namer::new([1; 16]));
        let title = titles(&namer, 1).remove(0);
        let name = title.name;
        let block = blocks.take(&namer).unwrap();
        assert_eq!(blocks.share(name), None);
        blocks.name(block, title);
        assert_eq!(blocks.share(name), Some(block));
        blocks.give_back(&[block]);
        blocks.give_back(&[block]);
        assert_eq!((blocks.available(), blocks.share(name)), (2, Some(block)));
        assert_eq!(blocks.available(), 1);
    }

    #[test]
    fn empty_blocks_go_first_then_the_longest_unused_from_the_end_of_its_sequence() {
        let (mut blocks, namer) = (Blocks::new(4), Namer::new([1; 16]));
        let names = names(&namer, 4);
        let taken: Vec<Block> = (0..3).map(|_| blocks.take(&namer).unwrap()).collect();
        taken.iter().zip(titles(&namer, 4)).for_each(|(block, title)| blocks.name(*block, title));
        blocks.give_back(&taken[..2]);
        blocks.give_back(&taken[2..]);
        assert_eq!(blocks.take(&namer), Some(3));
        assert_eq!(blocks.take(&namer), Some(taken[1]));
        assert_eq!(blocks.take(&namer), Some(taken[0]));
        assert_eq!((blocks.share(names[0]), blocks.share(names[2])), (None, Some(taken[2])));
        let sketch = blocks.sketch();
        assert_eq!((blocks.changes(), [0, 1, 2].map(|i| sketch.holds(&names[i]))), (5, [false, false, true]));
        assert_eq!(blocks.take(&namer), None);
    }

    #[test]
    fn a_block_that_begins_alike_is_found_until_it_is_taken() {
        let (mut blocks, namer) = (Blocks::new(2), Namer::new([1; 16]));
        for last in [5, 9] {
            let block = blocks.take(&namer).unwrap();
            let tokens = std::array::from_fn(|i| if i < 10 { 7 } else { last });
            let (before, name) = (namer.root(), namer.name(namer.root(), &tokens));
            blocks.name(block, Title { name, before, tokens });
            blocks.give_back(&[block]);
        }
        let alike = |blocks: &Blocks, tokens: &[Token]| blocks.alike(namer.root(), tokens).map(|(_, n)| n);
        let nine: Vec<Token> = [vec![7; 10], vec![9; 3], vec![1; 9]].concat();
        assert_eq!((alike(&blocks, &nine), alike(&blocks, &[7; 3]), alike(&blocks, &[1])), (Some(13), Some(3), None));
        assert_eq!(blocks.alike(Namer::new([2; 16]).root(), &nine), None, "another tenant");
        assert!(blocks.take(&namer).is_some() && blocks.take(&namer).is_some());
        assert_eq!(alike(&blocks, &nine), None);
    }

    #[test]
    fn a_block_is_cleared_when_it_changes_hands() {
        let (mut blocks, a, b) = (Blocks::new(1), Namer::new([1; 16]), Namer::new([2; 16]));
        for (namer, cleared) in [(&a, 0), (&a, 0), (&b, 1), (&b, 0), (&a, 1)] {
            let block = blocks.take(namer).unwrap();
            assert_eq!(blocks.take_cleared().len(), cleared);
            blocks.give_back(&[block]);
        }
    }

    proptest! {
        #[test]
        fn blocks_are_never_lost_and_never_given_twice(steps in proptest::collection::vec((0_u8..4, 0_usize..8), 0..200)) {
            let (mut blocks, namer) = (Blocks::new(5), Namer::new([1; 16]));
            let titles = titles(&namer, 8);
            let mut held: Vec<Block> = Vec::new();
            for (act, pick) in steps {
                match act {
                    0 => held.extend(blocks.take(&namer)),
                    1 => held.extend(blocks.share(titles[pick].name)),
                    2 if !held.is_empty() => blocks.name(held[pick % held.len()], titles[pick].clone()),
                    _ if !held.is_empty() => {
                        let block = held.swap_remove(pick % held.len());
                        blocks.give_back(&[block]);
                    }
                    _ => {}
                }
                let mut used = held.clone();
                used.sort_unstable();
                used.dedup();
                prop_assert_eq!(used.len() + blocks.available(), 5);
            }
        }
    }
}
