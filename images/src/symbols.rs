//! Names for a kernel's addresses.

use object::{Object, ObjectSymbol, SymbolKind};

/// The kernel's functions by address.
#[derive(Clone, Debug, Default)]
pub struct Symbols {
    functions: Vec<(u64, String)>,
    end: u64,
}

impl Symbols {
    /// Reads an ELF's symbol table; one that is no ELF has no names.
    #[must_use]
    pub fn of(kernel: &[u8]) -> Self {
        let Ok(file) = object::File::parse(kernel) else { return Self::default() };
        let mut functions = Vec::new();
        let mut end = 0;
        for symbol in file.symbols().filter(|symbol| symbol.kind() == SymbolKind::Text) {
            if let Ok(name) = symbol.name() {
                functions.push((symbol.address(), format!("{:#}", rustc_demangle::demangle(name))));
                end = end.max(symbol.address() + symbol.size());
            }
        }
        functions.sort();
        Self { functions, end }
    }

    /// `function+0x12`, or the bare address where no function is known.
    #[must_use]
    pub fn name(&self, address: u64) -> String {
        let after = self.functions.partition_point(|(start, _)| *start <= address);
        match after.checked_sub(1).and_then(|index| self.functions.get(index)) {
            Some((start, name)) if address < self.end => format!("{name}+{:#x}", address - start),
            _ => format!("{address:#x}"),
        }
    }
}
