//! `image build`, `inspect`, `verify`, `ls`.

use std::{
    env, fs,
    io::Write as _,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use kage_host::{config::Config, init};
use kage_images::{ImageError, ImageFile, Node, PublicKey, Restart, SigningKey, Trust, assemble};
use serde::Serialize;

use crate::{
    cli::{ImageCommand, TrustArgs},
    client::Failure,
    output::{Output, bytes, table},
};

/// Where a host keeps image files unless its configuration says otherwise.
const IMAGES: &str = "/var/lib/kage/images";

/// The image that is part of this program.
const BUILT_IN: &str = "default";

/// An image, as `inspect` shows it.
#[derive(Debug, Serialize)]
struct Shown {
    file: Option<PathBuf>,
    name: String,
    hash: String,
    engine: String,
    abi: u32,
    signer: Option<String>,
    trusted: bool,
    memory_bytes: u64,
    disk_bytes: u64,
    kernel_bytes: usize,
    programs: Vec<ShownProgram>,
    services: Vec<ShownService>,
    files: Vec<ShownFile>,
    limits: ShownLimits,
}

#[derive(Debug, Serialize)]
struct ShownProgram {
    name: String,
    aliases: Vec<String>,
    code_bytes: usize,
}

#[derive(Debug, Serialize)]
struct ShownService {
    name: String,
    command: Vec<String>,
    restart: &'static str,
}

#[derive(Debug, Serialize)]
struct ShownFile {
    path: String,
    kind: &'static str,
    bytes: usize,
}

#[derive(Debug, Serialize)]
struct ShownLimits {
    processes: Option<u32>,
    process_memory_bytes: Option<u64>,
}

impl Shown {
    fn new(file: Option<PathBuf>, image: &ImageFile, trusted: bool) -> Self {
        let manifest = image.manifest();
        let programs = manifest.programs.iter().zip(image.programs());
        let services = manifest.services.iter().map(|service| ShownService {
            name: service.name.clone(),
            command: std::iter::once(&service.program).chain(&service.arguments).cloned().collect(),
            restart: match service.restart {
                Restart::Never => "never",
                Restart::OnFailure => "on-failure",
                Restart::Always => "always",
            },
        });
        let files = image.files().iter().map(|file| {
            let (kind, bytes) = match &file.node {
                Node::Directory => ("directory", 0),
                Node::File(bytes) => ("file", bytes.len()),
                Node::Link(_) => ("link", 0),
            };
            ShownFile { path: file.path.clone(), kind, bytes }
        });
        Self {
            file,
            name: manifest.name.clone(),
            hash: hash(image),
            engine: image.engine().to_owned(),
            abi: kage_abi::ABI_VERSION,
            signer: image.signer().map(ToString::to_string),
            trusted,
            memory_bytes: manifest.memory,
            disk_bytes: manifest.disk,
            kernel_bytes: image.kernel().len(),
            programs: programs
                .map(|(entry, program)| ShownProgram {
                    name: entry.name.clone(),
                    aliases: entry.aliases.clone(),
                    code_bytes: program.code().len(),
                })
                .collect(),
            services: services.collect(),
            files: files.collect(),
            limits: ShownLimits {
                processes: manifest.limits.processes,
                process_memory_bytes: manifest.limits.process_memory,
            },
        }
    }

    fn text(&self) -> String {
        let trusted = if self.trusted { "trusted here" } else { "not trusted here" };
        let signer = self.signer.as_deref().unwrap_or("part of kage");
        let mut rows = vec![
            vec!["name".into(), self.name.clone()],
            vec!["hash".into(), self.hash.clone()],
            vec!["signed by".into(), format!("{signer} ({trusted})")],
            vec!["engine".into(), self.engine.clone()],
            vec!["memory".into(), bytes(self.memory_bytes)],
            vec!["disk".into(), bytes(self.disk_bytes)],
            vec!["kernel".into(), bytes(self.kernel_bytes as u64)],
        ];
        for program in &self.programs {
            let names = std::iter::once(&program.name).chain(&program.aliases).cloned().collect::<Vec<_>>();
            rows.push(vec![
                "program".into(),
                format!("{} ({})", names.join(" "), bytes(program.code_bytes as u64)),
            ]);
        }
        for service in &self.services {
            let (name, command) = (&service.name, service.command.join(" "));
            rows.push(vec!["service".into(), format!("{name}: {command} (restart {})", service.restart)]);
        }
        let total: usize = self.files.iter().map(|file| file.bytes).sum();
        rows.push(vec!["files".into(), format!("{} ({})", self.files.len(), bytes(total as u64))]);
        table(&["FIELD", "VALUE"], &rows)
    }
}

/// One row of `ls`.
#[derive(Debug, Serialize)]
struct Listed {
    name: String,
    file: Option<PathBuf>,
    usable: bool,
    reason: Option<String>,
    hash: Option<String>,
    engine: Option<String>,
    signer: Option<String>,
    memory_bytes: Option<u64>,
    programs: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Verified {
    file: PathBuf,
    name: String,
    hash: String,
    signer: Option<String>,
}

/// Runs `kage image …`.
pub fn run(command: ImageCommand, output: Output) -> Result<(), Failure> {
    match command {
        ImageCommand::Build { dir, to, key } => build(&dir, to, key, output),
        ImageCommand::Inspect { file, trust } => {
            let trusted = trusted(&trust)?;
            let image = read(&file, &Trust::Anyone)?;
            let known = image.signer().is_some_and(|signer| trusted.contains(signer));
            output.result(&Shown::new(Some(file), &image, known), Shown::text)
        }
        ImageCommand::Verify { file, trust } => {
            let image = read(&file, &Trust::Keys(trusted(&trust)?))?;
            let signer = image.signer().map(ToString::to_string);
            let verified = Verified { file, name: image.manifest().name.clone(), hash: hash(&image), signer };
            output.result(&verified, |verified| {
                let signer = verified.signer.as_deref().unwrap_or_default();
                format!("{}: whole, signed by {signer}", verified.file.display())
            })
        }
        ImageCommand::Ls { dir, trust } => ls(dir, &trust, output),
    }
}

fn build(dir: &Path, to: Option<PathBuf>, key: Option<PathBuf>, output: Output) -> Result<(), Failure> {
    if !dir.join("image.toml").exists() {
        let message = format!("{}: no image.toml there; docs/images.md shows one", dir.display());
        return Err(Failure { exit: 3, message });
    }
    let key = signing_key(key, output)?;
    let image = assemble(dir).map_err(Failure::new)?;
    let file = to.unwrap_or_else(|| PathBuf::from(format!("{}.kage", image.manifest().name)));
    let failed = |error| Failure::new(format!("{}: {error}", file.display()));
    let encoded = image.encode(&key).map_err(failed)?;
    // Read as a host would: what is refused there must not be left here.
    let image = ImageFile::decode(&file.display().to_string(), &encoded, &Trust::Keys(vec![key.public()]))
        .map_err(Failure::new)?;
    write_whole(&file, &encoded).map_err(failed)?;
    output.progress(format!("{}: {}", file.display(), bytes(encoded.len() as u64)));
    output.result(&Shown::new(Some(file.clone()), &image, true), Shown::text)
}

/// Puts a file in its place once it is whole, so that the one that was there stays until then.
fn write_whole(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".new-{}", std::process::id()));
    let new = path.with_file_name(name);
    let written = fs::File::create(&new)
        .and_then(|mut file| file.write_all(bytes).and_then(|()| file.sync_all()))
        .and_then(|()| fs::rename(&new, path));
    if written.is_err() {
        let _ = fs::remove_file(&new);
    }
    written
}

fn ls(dir: Option<PathBuf>, trust: &TrustArgs, output: Output) -> Result<(), Failure> {
    let keys = Trust::Keys(trusted(trust)?);
    let of_host = config(trust)?.map(|config| kage_host::real::images_dir(&config.host.state_dir));
    let configured = of_host.is_some();
    let given = dir.is_some() || configured;
    let dir = dir.or(of_host).unwrap_or_else(|| PathBuf::from(IMAGES));
    let built_in = ImageFile::embedded();
    let mut all = vec![listed(BUILT_IN.to_owned(), None, Ok(built_in))];
    let entries = match fs::read_dir(&dir) {
        Ok(entries) => entries.filter_map(|entry| Some(entry.ok()?.path())).collect(),
        Err(error) if given => return Err(Failure::new(format!("{}: {error}", dir.display()))),
        Err(_) => Vec::new(),
    };
    let mut files: Vec<PathBuf> =
        entries.into_iter().filter(|path| path.extension().is_some_and(|end| end == "kage")).collect();
    files.sort();
    for path in files {
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let mut row = listed(name, Some(path.clone()), ImageFile::read(&path, &keys));
        if row.name == BUILT_IN {
            row.usable = false;
            row.reason = Some(format!("no host reads it: {BUILT_IN} is the image that is part of kage"));
        }
        all.push(row);
    }
    output.result(&all, |all| {
        let rows: Vec<_> = all
            .iter()
            .map(|image| {
                let state = image.reason.clone().unwrap_or_else(|| "yes".to_owned());
                let hash = image.hash.as_deref().and_then(|hash| hash.get(..12)).unwrap_or("-");
                let memory = image.memory_bytes.map_or("-".to_owned(), bytes);
                vec![image.name.clone(), hash.to_owned(), memory, image.programs.len().to_string(), state]
            })
            .collect();
        // Whom a daemon trusts is said by its configuration alone.
        let head = if configured { "USABLE" } else { "USABLE WITH YOUR KEYS" };
        table(&["NAME", "HASH", "MEMORY", "PROGRAMS", head], &rows)
    })
}

fn listed(name: String, file: Option<PathBuf>, image: Result<ImageFile, ImageError>) -> Listed {
    match image {
        Ok(image) => Listed {
            name,
            file,
            usable: true,
            reason: None,
            hash: Some(hash(&image)),
            engine: Some(image.engine().to_owned()),
            signer: image.signer().map(ToString::to_string),
            memory_bytes: Some(image.manifest().memory),
            programs: image.manifest().program_names().map(str::to_owned).collect(),
        },
        Err(error) => Listed {
            name,
            file,
            usable: false,
            reason: Some(error.to_string()),
            hash: None,
            engine: None,
            signer: None,
            memory_bytes: None,
            programs: Vec::new(),
        },
    }
}

fn hash(image: &ImageFile) -> String {
    image.content_hash().iter().map(|byte| format!("{byte:02x}")).collect()
}

fn read(file: &Path, trust: &Trust) -> Result<ImageFile, Failure> {
    ImageFile::read(file, trust).map_err(|error| {
        let missing =
            matches!(&error, ImageError::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound);
        Failure { exit: if missing { 3 } else { 1 }, message: error.to_string() }
    })
}

/// Where signing keys are looked for; the last one is made when it is wanted and none is there.
fn key_files() -> Vec<PathBuf> {
    let [first, rest @ ..] = &own_key_files()[..] else { return Vec::new() };
    let here = PathBuf::from("kage-site").join(init::IMAGE_KEY);
    [first.clone(), here].into_iter().chain(rest.iter().cloned()).collect()
}

/// Those of them that are this machine's or user's: what merely lies in the directory one happens to be in may have come
/// with the image itself, so it is trusted only where it is named.
fn own_key_files() -> Vec<PathBuf> {
    let mut files = vec![PathBuf::from("/etc/kage").join(init::IMAGE_KEY)];
    let home = env::var_os("XDG_CONFIG_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(PathBuf::from(env::var_os("HOME")?).join(".config")));
    files.extend(home.map(|home| home.join("kage").join(init::IMAGE_KEY)));
    files
}

fn signing_key(given: Option<PathBuf>, output: Output) -> Result<SigningKey, Failure> {
    let given = given.or_else(|| env::var_os("KAGE_IMAGE_KEY").map(PathBuf::from));
    let files = key_files();
    let path = match (given, files.iter().find(|path| path.exists()), files.last()) {
        (Some(given), ..) => given,
        (None, Some(found), _) => found.clone(),
        (None, None, Some(own)) => {
            make_key(own).map_err(|error| Failure::new(format!("{}: {error}", own.display())))?;
            output.progress(format!("made a key that signs your images: {}", own.display()));
            own.clone()
        }
        (None, None, None) => {
            return Err(Failure::usage("no key to sign with: --key FILE; `kage init` makes one"));
        }
    };
    SigningKey::read(&path).map_err(|error| Failure::new(format!("{}: {error}", path.display())))
}

fn make_key(path: &Path) -> std::io::Result<()> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    let mut seed = [0; 32];
    init::random(&mut seed);
    let key = SigningKey::from_seed(&seed);
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(key.to_text().as_bytes())?;
    fs::write(path.with_extension("pub"), format!("{}\n", key.public()))
}

fn config(args: &TrustArgs) -> Result<Option<Config>, Failure> {
    args.config.as_deref().map(Config::load).transpose().map_err(Failure::usage)
}

/// Keys that the options name; without any, those that sign here.
fn trusted(args: &TrustArgs) -> Result<Vec<PublicKey>, Failure> {
    let mut keys = Vec::new();
    for text in &args.trust {
        let key = match text.parse() {
            Ok(key) => key,
            Err(error) if text.starts_with("ed25519:") => return Err(Failure::usage(error)),
            Err(_) => public_key(Path::new(text)).map_err(Failure::usage)?,
        };
        keys.push(key);
    }
    if let Some(config) = config(args)? {
        keys.extend(config.image.trusted_keys.iter().map(|key| key.0));
    } else if keys.is_empty() {
        let given = env::var_os("KAGE_IMAGE_KEY").map(PathBuf::from);
        let files = own_key_files().into_iter().chain(given).map(|path| path.with_extension("pub"));
        keys.extend(files.filter_map(|path| public_key(&path).ok()));
    }
    Ok(keys)
}

fn public_key(path: &Path) -> Result<PublicKey, String> {
    let text = fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?;
    text.trim().parse().map_err(|error| format!("{}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_that_is_there_stays_until_the_new_one_is_whole() {
        let dir = env::temp_dir().join(format!("kage-image-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let file = dir.join("x.kage");
        write_whole(&file, b"first").unwrap();
        write_whole(&file, b"second").unwrap();
        assert_eq!(fs::read(&file).unwrap(), b"second");
        fs::create_dir(dir.join("directory")).unwrap();
        assert!(write_whole(&dir.join("directory"), b"third").is_err());
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 2, "nothing half is left");
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn only_keys_of_the_machine_and_the_user_are_trusted_unasked() {
        assert!(key_files().iter().any(|path| path.starts_with("kage-site")));
        assert!(own_key_files().iter().all(|path| path.is_absolute()));
        assert_eq!(key_files().last(), own_key_files().last());
    }
}
