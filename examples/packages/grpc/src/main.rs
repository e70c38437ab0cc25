//! Serves, and lets the client in Python check what the layer promises.

use grpc::{idempotency, run_client, serve, Bank, Error};

#[tokio::main]
async fn main() -> Result<(), Error> {
    let server = serve(idempotency(), Bank::default()).await?;
    let (output, is_as_promised) = tokio::task::spawn_blocking(move || run_client(server)).await??;
    print!("{output}");
    if is_as_promised {
        Ok(())
    } else {
        Err("that is not what was promised".into())
    }
}
