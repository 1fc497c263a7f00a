use std::path::Path;

use super::*;

/// A directory that goes away with the test.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("kage-assemble-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn put(&self, path: &str, content: impl AsRef<[u8]>) -> &Self {
        let path = self.0.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
        self
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// `(module (func (export "_start")))`
const EMPTY: &[u8] =
    b"\0asm\x01\0\0\0\x01\x04\x01\x60\0\0\x03\x02\x01\0\x07\x0a\x01\x06_start\0\0\x0a\x04\x01\x02\0\x0b";

fn refusal(directory: &Path) -> String {
    assemble(directory).unwrap_err().to_string()
}

#[test]
fn an_image_is_made_of_a_directory() {
    let scratch = Scratch::new("whole");
    let manifest = "name = 'mine'\nfiles = 'tree'\n[[program]]\nname = 'empty'\nwasm = 'empty.wasm'\n\
                    [[program]]\nname = 'kv'\n[[service]]\nname = 'kv'\nprogram = 'kv'";
    scratch.put("image.toml", manifest).put("empty.wasm", EMPTY).put("tree/etc/hello", "hi");
    std::os::unix::fs::symlink("etc/hello", scratch.0.join("tree/link")).unwrap();
    let image = assemble(&scratch.0).unwrap();
    let names: Vec<_> = image.programs().iter().map(Program::name).collect();
    assert_eq!(names, ["empty", "kv"]);
    assert!(image.programs()[0].code().starts_with(b"\x7fELF"));
    let paths: Vec<_> = image.files().iter().map(|file| file.path.as_str()).collect();
    assert_eq!(paths, ["/etc", "/etc/hello", "/link"]);
    assert_eq!(image, assemble(&scratch.0).unwrap(), "the same directory makes the same image");
}

#[test]
fn what_cannot_be_made_is_named() {
    let scratch = Scratch::new("refused");
    assert!(refusal(&scratch.0).contains("image.toml"));
    let with = |program: &str| {
        scratch.put("image.toml", format!("name = 'x'\n[[program]]\nname = 'p'\n{program}"));
        refusal(&scratch.0)
    };
    assert!(with("").contains("the default image has none"), "{}", with(""));
    assert!(with("wasm = 'none.wasm'").contains("none.wasm"));
    assert!(with("wasm = '../x.wasm'").contains("leads out"));
    scratch.put("p.wasm", "no module");
    assert!(with("wasm = 'p.wasm'").contains("not a WebAssembly module"));
    scratch.put("p.wasm", &EMPTY[..20]);
    assert!(with("wasm = 'p.wasm'").contains("not a valid module"));
}
