from imagewam_cli.cli.app import main

main()
