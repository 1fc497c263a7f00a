use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;

const MEMORY: u64 = 16 << 20;
const FRAMES: u32 = (MEMORY / PAGE) as u32;
const W: u64 = frame::PRESENT | frame::WRITABLE;

/// What a processor finds at `address`, without the flags of upper levels.
fn walk(tables: &Tables, address: u64) -> Option<u64> {
    let mut table = ((address - window::FIRST) >> 39) as usize;
    for shift in [30, 21, 12] {
        let entry = tables.words.get(table * ENTRIES + (address >> shift) as usize % ENTRIES);
        if entry & PRESENT == 0 {
            return None;
        }
        if shift == 12 {
            return Some(entry);
        }
        table = (((entry & ADDRESS) - abi::TABLES) / PAGE) as usize;
        assert!(table < tables.used && table >= window::ROOT_ENTRIES as usize);
    }
    None
}

/// What the interface promises for an entry, in other words than the code's.
fn promised(number: u32, entry: u64) -> Option<(u64, u64)> {
    let known = frame::ADDRESS | frame::PRESENT | frame::WRITABLE | frame::EXECUTABLE;
    let address = entry & frame::ADDRESS;
    let in_code = (window::CODE..window::END).contains(&address);
    let in_data = (window::MEMORY..window::CODE).contains(&address);
    let leaf = (abi::MEMORY + u64::from(number) * PAGE) | PRESENT | USER | ACCESSED | DIRTY;
    if entry & !known != 0 {
        return None;
    }
    match (entry & frame::WRITABLE != 0, entry & frame::EXECUTABLE != 0) {
        (false, false) if in_code || in_data => Some((address, leaf | NO_EXECUTE)),
        (true, false) if in_code || in_data => Some((address, leaf | NO_EXECUTE | WRITABLE)),
        (false, true) if in_code => Some((address, leaf)),
        _ => None,
    }
}

fn entries() -> impl Strategy<Value = (u32, u64)> {
    // Few places, so that they meet; now and then any bits at all.
    let address = prop_oneof![
        8 => (0u64..4, 0u64..3, 0u64..4).prop_map(|(region, far, page)| {
            [window::MEMORY, window::STACK, window::CODE, window::END][region as usize] + (far << 29) + page * PAGE
        }),
        1 => any::<u64>(),
    ];
    let flags = prop_oneof![8 => 0u64..8, 1 => any::<u64>()];
    // Few frames too, so that one is asked for twice.
    (prop_oneof![0..8u32, 0..FRAMES], address, flags)
        .prop_map(|(number, address, flags)| (number, address | flags | frame::PRESENT))
}

proptest! {
    #[test]
    fn only_what_is_promised_is_mapped(all in prop::collection::vec(entries(), 1..200)) {
        let mut tables = Tables::new(MEMORY).unwrap();
        let mut model = BTreeMap::new();
        let mut code = BTreeSet::new();
        for (number, entry) in all {
            let result = tables.map(number, entry);
            match promised(number, entry) {
                None => prop_assert_eq!(result, Err(MapError::Entry { frame: number, entry })),
                Some((address, _)) if entry & frame::WRITABLE != 0 && code.contains(&number) => {
                    prop_assert_eq!(result, Err(MapError::Code { frame: number, address }));
                }
                Some((address, leaf)) => {
                    if entry & frame::EXECUTABLE != 0 {
                        code.insert(number);
                    }
                    let there = *model.entry(address).or_insert(leaf);
                    let expected =
                        if there == leaf { Ok(()) } else { Err(MapError::Taken { frame: number, address }) };
                    prop_assert_eq!(result, expected);
                }
            }
        }
        for (&address, &leaf) in &model {
            prop_assert_eq!(walk(&tables, address), Some(leaf));
            prop_assert!(walk(&tables, address + 512 * PAGE).is_none() || model.contains_key(&(address + 512 * PAGE)));
        }
        tables.clear().unwrap();
        prop_assert!(model.keys().all(|&address| walk(&tables, address).is_none()));
    }
}

#[test]
fn the_budget_holds_and_a_clear_gives_it_back() {
    let mut tables = Tables::new(MEMORY).unwrap();
    let far = |at: u32| (window::MEMORY + (u64::from(at) << 30)) | W;
    for _ in 0..2 {
        let free = (tables.pages - tables.used) as u32;
        for at in 0..free / 2 {
            tables.map(at, far(at)).unwrap();
        }
        assert_eq!(tables.map(FRAMES - 1, far(free / 2 + 1)), Err(MapError::NoTable));
        // What has its tables still finds room.
        tables.map(FRAMES - 1, far(0) + PAGE).unwrap();
        tables.clear().unwrap();
    }
}

#[test]
fn a_page_of_any_window_can_be_mapped() {
    let mut tables = Tables::new(MEMORY).unwrap();
    for (at, address) in
        [window::MEMORY, window::STACK - PAGE, window::STACK, window::CODE, window::END - PAGE]
            .into_iter()
            .enumerate()
    {
        tables.map(at as u32, address | frame::PRESENT).unwrap();
        assert!(walk(&tables, address).is_some());
    }
}
